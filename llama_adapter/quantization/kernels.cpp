// Products with quantised matrices, and one decoding step of a LLaMA-like decoder, on a CPU.
//
// Plain C++ with the vector extensions of GCC and Clang: the same lines become AVX2, AVX-512 or NEON. Weights
// are turned into floats in registers, so memory is read at the quantised size and the arithmetic is float32.
//
// A matrix is (rows, columns), row after row, each cut into blocks of 32 inputs. A weight is
// scale * number + offset, with one scale (and in some formats one offset) a block.
//
// Shapes: B rows of a batch, D hidden size, H heads, G key-value heads, d head width, S places of the cache,
// K prompts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t CHUNK = 32;  // rows of a matrix that a thread takes at a time

typedef float Floats __attribute__((vector_size(32)));

inline Floats load(const float* from) {
    Floats to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// Eight bytes as floats: what GCC 12 makes of plain code here is an order slower on x86.
inline Floats floats_of(const int8_t* from) {
#ifdef __AVX2__
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Floats to;
    for (int i = 0; i < 8; i++) to[i] = from[i];
    return to;
#endif
}

// The low and the high halves of eight bytes as floats.
inline void floats_of_halves(const uint8_t* from, Floats& low, Floats& high) {
#ifdef __AVX2__
    const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    low = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
    high = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
#else
    for (int i = 0; i < 8; i++) {
        low[i] = from[i] & 15;
        high[i] = from[i] >> 4;
    }
#endif
}

inline float sum(Floats v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// A finite float16, given by its bits.
inline float to_float(uint16_t half) {
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    const uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;  // the exponents' biases differ by 112; right for the smallest numbers too
    return half & 0x8000 ? -value : value;
#endif
}

}  // namespace

// What Python hands over (see kernels.py, which has the same fields).
extern "C" struct Matrix {
    int64_t format;  // 0 float32, 1 int8, 2 int4
    int64_t rows, columns;
    const void* numbers;
    const uint16_t* scales;   // float16, (rows, blocks)
    const uint16_t* offsets;  // float16, (rows, blocks); int4 only
    const float* bias;        // (rows,) or null
};

namespace {

// One row of a matrix; unpack() gives the 32 numbers of a block, its scale and its offset.
struct Int8Row {
    const int8_t* numbers;
    const uint16_t* scales;
    Int8Row(const Matrix& m, int64_t row)
        : numbers(static_cast<const int8_t*>(m.numbers) + row * m.columns),
          scales(m.scales + row * ((m.columns + BLOCK - 1) / BLOCK)) {}
    static constexpr bool has_offset = false;
    inline float scale(int64_t block) const { return to_float(scales[block]); }
    inline float offset(int64_t) const { return 0; }
    inline void unpack(int64_t block, Floats to[4]) const {
        for (int part = 0; part < 4; part++) to[part] = floats_of(numbers + block * BLOCK + part * 8);
    }
    inline float number(int64_t column) const { return numbers[column]; }
};

// Two numbers a byte: of each block first those of inputs 0..15 (low halves) and 16..31 (high halves).
struct Int4Row {
    const uint8_t* numbers;
    const uint16_t *scales, *offsets;
    Int4Row(const Matrix& m, int64_t row) {
        const int64_t blocks = (m.columns + BLOCK - 1) / BLOCK;
        numbers = static_cast<const uint8_t*>(m.numbers) + row * blocks * BLOCK / 2;
        scales = m.scales + row * blocks;
        offsets = m.offsets + row * blocks;
    }
    static constexpr bool has_offset = true;
    inline float scale(int64_t block) const { return to_float(scales[block]); }
    inline float offset(int64_t block) const { return to_float(offsets[block]); }
    inline void unpack(int64_t block, Floats to[4]) const {
        for (int part = 0; part < 2; part++)
            floats_of_halves(numbers + block * BLOCK / 2 + part * 8, to[part], to[part + 2]);
    }
    inline float number(int64_t column) const {
        const int64_t block = column / BLOCK, place = column % BLOCK;
        const uint8_t byte = numbers[block * BLOCK / 2 + place % 16];
        return place < 16 ? byte & 15 : byte >> 4;
    }
};

struct FloatRow {
    const float* numbers;
    FloatRow(const Matrix& m, int64_t row) : numbers(static_cast<const float*>(m.numbers) + row * m.columns) {}
    static constexpr bool has_offset = false;
    inline float scale(int64_t) const { return 1; }
    inline float offset(int64_t) const { return 0; }
    inline void unpack(int64_t block, Floats to[4]) const {
        for (int part = 0; part < 4; part++) to[part] = load(numbers + block * BLOCK + part * 8);
    }
    inline float number(int64_t column) const { return numbers[column]; }
};

// One row of a matrix times T vectors: to[t] = row . x[t]
template <class Row, int T>
inline void dot(const Row& row, int64_t columns, const float* x, float* to) {
    Floats total[T] = {};
    const int64_t whole = columns / BLOCK;
    for (int64_t block = 0; block < whole; block++) {
        Floats numbers[4];
        row.unpack(block, numbers);
        const float scale = row.scale(block);
        const float offset = row.offset(block);
        for (int t = 0; t < T; t++) {
            const float* from = x + t * columns + block * BLOCK;
            const Floats x0 = load(from), x1 = load(from + 8), x2 = load(from + 16), x3 = load(from + 24);
            total[t] += (numbers[0] * x0 + numbers[1] * x1 + numbers[2] * x2 + numbers[3] * x3) * scale;
            if (Row::has_offset) total[t] += (x0 + x1 + x2 + x3) * offset;
        }
    }
    for (int t = 0; t < T; t++) to[t] = sum(total[t]);
    for (int64_t column = whole * BLOCK; column < columns; column++) {  // a last block that is not full
        const float weight = row.number(column) * row.scale(whole) + row.offset(whole);
        for (int t = 0; t < T; t++) to[t] += weight * x[t * columns + column];
    }
}

// Rows first..last of a matrix times `count` vectors: y[t][row], with `stride` between vectors of y.
template <class Row>
void product(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t count, float* y, int64_t stride) {
    for (int64_t row = first; row < last; row++) {
        const Row weights(m, row);
        const float bias = m.bias ? m.bias[row] : 0;
        int64_t t = 0;
        float to[4];
        for (; t + 4 <= count; t += 4) {
            dot<Row, 4>(weights, m.columns, x + t * m.columns, to);
            for (int i = 0; i < 4; i++) y[(t + i) * stride + row] = to[i] + bias;
        }
        for (; t + 2 <= count; t += 2) {
            dot<Row, 2>(weights, m.columns, x + t * m.columns, to);
            for (int i = 0; i < 2; i++) y[(t + i) * stride + row] = to[i] + bias;
        }
        for (; t < count; t++) {
            dot<Row, 1>(weights, m.columns, x + t * m.columns, to);
            y[t * stride + row] = to[0] + bias;
        }
    }
}

void multiply(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t count, float* y, int64_t stride) {
    switch (m.format) {
        case 0: return product<FloatRow>(m, first, last, x, count, y, stride);
        case 1: return product<Int8Row>(m, first, last, x, count, y, stride);
        case 2: return product<Int4Row>(m, first, last, x, count, y, stride);
    }
}

template <class Row>
void expand(const Matrix& m, int64_t row, float* to) {
    const Row weights(m, row);
    const int64_t whole = m.columns / BLOCK;
    for (int64_t block = 0; block < whole; block++) {
        Floats numbers[4];
        weights.unpack(block, numbers);
        const float scale = weights.scale(block), offset = weights.offset(block);
        for (int part = 0; part < 4; part++) {
            Floats values = numbers[part] * scale;
            if (Row::has_offset) values += offset;
            std::memcpy(to + block * BLOCK + part * 8, &values, sizeof values);
        }
    }
    for (int64_t column = whole * BLOCK; column < m.columns; column++)
        to[column] = weights.number(column) * weights.scale(whole) + weights.offset(whole);
}

int64_t chunks(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }

}  // namespace

// y (count, rows) = x (count, columns) times the matrix, plus its bias.
extern "C" void linear(const Matrix* m, const float* x, int64_t count, float* y, int64_t threads) {
    const int64_t parts = chunks(m->rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++)
        multiply(*m, part * CHUNK, std::min(m->rows, (part + 1) * CHUNK), x, count, y, m->rows);
}

// Rows first..last of the matrix as floats, (last - first, columns).
extern "C" void dequantize(const Matrix* m, int64_t first, int64_t last, float* to, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads) if (threads > 1)
    for (int64_t row = first; row < last; row++) {
        float* out = to + (row - first) * m->columns;
        switch (m->format) {
            case 0: expand<FloatRow>(*m, row, out); break;
            case 1: expand<Int8Row>(*m, row, out); break;
            case 2: expand<Int4Row>(*m, row, out); break;
        }
    }
}

// --- one decoding step ---------------------------------------------------------------------------------------

extern "C" struct Norm {
    const float* weight;  // null: there is none
    double epsilon;
};

extern "C" struct Layer {
    Matrix q, k, v, o, gate, up, down;
    Norm before_attention, before_mlp, of_queries, of_keys;
    double scaling;
};

// What an adapter adds to one layer; all fields are as wide as a pointer, and Python fills them as numbers.
extern "C" struct Added {
    const float *prompt_keys, *prompt_values;  // (1 or B, H, K, d), the gate in the values; null: no prompts
    int64_t prompts;                           // K
    int64_t prompt_stride;                     // from one row of the batch to the next; 0: all read the same
    const bool* prompt_mask;                   // (1 or B, K), false at padding; null: all are prompts
    int64_t mask_stride;
    struct {
        const float *scale, *bias;  // (1 or B, width): y + scale * y + bias; null: there are none
        int64_t stride;
    } projections[7];  // in the order of Layer
};

extern "C" struct Step {
    int64_t rows, threads;                // B
    int64_t heads, key_heads, head_dim;   // H, G, d
    int64_t hidden_size, layers;          // D
    int64_t length, capacity;             // S, before this step; and how many places the cache has room for
    const int64_t* starts;                // (B,) first place of each row that is no padding
    const float *cosines, *sines;         // (B, d)
    float* const* keys;                   // of each layer (B, G, capacity, d)
    float* const* values;
    const Added* added;                   // of each layer; null: nothing
    float* hidden;                        // (B, D): embeddings in, the last norm's output out
    Norm last;
};

namespace {

void normalize(const Norm& norm, const float* x, int64_t size, float* to) {
    double squares = 0;
    for (int64_t i = 0; i < size; i++) squares += static_cast<double>(x[i]) * x[i];
    const float factor = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(size) + norm.epsilon));
    for (int64_t i = 0; i < size; i++) to[i] = x[i] * factor * norm.weight[i];
}

float dot_floats(const float* a, const float* b, int64_t size) {
    Floats total = {};
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) total += load(a + i) * load(b + i);
    float all = sum(total);
    for (; i < size; i++) all += a[i] * b[i];
    return all;
}

// x (d,), normalised where the family does, rotated by halves.
void rotate(const Norm& norm, const float* x, const float* cosines, const float* sines, int64_t size, float* to) {
    float whole[1024];
    if (norm.weight) {
        normalize(norm, x, size, whole);
        x = whole;
    }
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        to[i] = x[i] * cosines[i] - x[i + half] * sines[i];
        to[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
    }
}

// scores (in place) -> their softmax, those that are -inf left out
void softmax(float* scores, int64_t count) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, scores[i]);
    for (int64_t i = 0; i < count; i++) total += scores[i] = std::exp(scores[i] - largest);
    const float factor = 1 / total;
    for (int64_t i = 0; i < count; i++) scores[i] *= factor;
}

void add_scaled(float* to, const float* from, float factor, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] += factor * from[i];
}

// What one head of one row reads from the tokens and from the prompts. Each head rotates its key itself, so
// that none waits for another; the first of a group writes it to the cache.
void attend(const Step& step, const Layer& layer, int64_t index, int64_t row, int64_t head, const float* projected,
            std::vector<float>& scores, float* to) {
    const int64_t d = step.head_dim, group = head / (step.heads / step.key_heads);
    const float* q = projected + head * d;
    const float* k = projected + (step.heads + group) * d;
    const float* v = projected + (step.heads + step.key_heads + group) * d;
    const float *cosines = step.cosines + row * d, *sines = step.sines + row * d;
    float query[1024], key[1024];
    rotate(layer.of_queries, q, cosines, sines, d, query);
    rotate(layer.of_keys, k, cosines, sines, d, key);
    const int64_t place = (row * step.key_heads + group) * step.capacity * d;
    float *keys = step.keys[index] + place, *values = step.values[index] + place;
    if (head % (step.heads / step.key_heads) == 0) {
        std::memcpy(keys + step.length * d, key, sizeof(float) * d);
        std::memcpy(values + step.length * d, v, sizeof(float) * d);
    }
    const float scaling = static_cast<float>(layer.scaling);
    const int64_t start = step.starts[row], count = step.length - start + 1;
    const Added* added = step.added ? step.added + index : nullptr;
    const int64_t prompts = added && added->prompt_keys ? added->prompts : 0;
    scores.resize(std::max(count, prompts));
    for (int64_t i = 0; i + 1 < count; i++) scores[i] = dot_floats(query, keys + (start + i) * d, d) * scaling;
    scores[count - 1] = dot_floats(query, key, d) * scaling;
    softmax(scores.data(), count);
    std::fill(to, to + d, 0.0f);
    for (int64_t i = 0; i + 1 < count; i++) add_scaled(to, values + (start + i) * d, scores[i], d);
    add_scaled(to, v, scores[count - 1], d);
    if (!prompts) return;
    const int64_t at = row * added->prompt_stride + head * prompts * d;
    const bool* mask = added->prompt_mask ? added->prompt_mask + row * added->mask_stride : nullptr;
    for (int64_t i = 0; i < prompts; i++)
        scores[i] = mask && !mask[i] ? -INFINITY : dot_floats(query, added->prompt_keys + at + i * d, d) * scaling;
    softmax(scores.data(), prompts);
    for (int64_t i = 0; i < prompts; i++) add_scaled(to, added->prompt_values + at + i * d, scores[i], d);
}

// Scales and biases of outputs first..last of one projection, for every row of the batch.
void tune(const Added* added, int number, int64_t rows, int64_t first, int64_t last, float* y, int64_t y_stride) {
    if (!added || !added->projections[number].scale) return;
    const auto& own = added->projections[number];
    for (int64_t row = 0; row < rows; row++) {
        const float *scale = own.scale + row * own.stride, *bias = own.bias + row * own.stride;
        float* out = y + row * y_stride;
        for (int64_t i = first; i < last; i++) out[i] += scale[i] * out[i] + bias[i];
    }
}

}  // namespace

// One token of every row through all layers and the last norm. Called with the cache's room already made.
extern "C" void decode(const Layer* layers, const Step* given) {
    const Step& step = *given;
    const int64_t B = step.rows, D = step.hidden_size, d = step.head_dim;
    const int64_t width = (step.heads + 2 * step.key_heads) * d, read = step.heads * d;
    int64_t widest = 0;
    for (int64_t i = 0; i < step.layers; i++) widest = std::max(widest, layers[i].gate.rows);
    std::vector<float> projected(B * width), attended(B * read), gates(B * widest), ups(B * widest), sums(B * D);
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
    {
        std::vector<float> normed(B * D), scores;
        for (int64_t index = 0; index < step.layers; index++) {
            const Layer& layer = layers[index];
            const Added* added = step.added ? step.added + index : nullptr;
            for (int64_t row = 0; row < B; row++)
                normalize(layer.before_attention, step.hidden + row * D, D, normed.data() + row * D);
            const Matrix* parts[3] = {&layer.q, &layer.k, &layer.v};
            const int64_t counts[3] = {chunks(layer.q.rows), chunks(layer.k.rows), chunks(layer.v.rows)};
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < counts[0] + counts[1] + counts[2]; part++) {
                int which = 0;
                int64_t chunk = part, before = 0;
                while (chunk >= counts[which]) {
                    chunk -= counts[which];
                    before += parts[which++]->rows;
                }
                const Matrix& m = *parts[which];
                const int64_t first = chunk * CHUNK, last = std::min(m.rows, first + CHUNK);
                multiply(m, first, last, normed.data(), B, projected.data() + before, width);
                tune(added, which, B, first, last, projected.data() + before, width);
            }
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < B * step.heads; part++) {
                const int64_t row = part / step.heads, head = part % step.heads;
                attend(step, layer, index, row, head, projected.data() + row * width, scores,
                       attended.data() + row * read + head * d);
            }
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < chunks(D); part++) {
                const int64_t first = part * CHUNK, last = std::min(D, first + CHUNK);
                multiply(layer.o, first, last, attended.data(), B, sums.data(), D);
                tune(added, 3, B, first, last, sums.data(), D);
                for (int64_t row = 0; row < B; row++)
                    for (int64_t i = first; i < last; i++) step.hidden[row * D + i] += sums[row * D + i];
            }
            for (int64_t row = 0; row < B; row++)
                normalize(layer.before_mlp, step.hidden + row * D, D, normed.data() + row * D);
            const int64_t inner = layer.gate.rows;
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < chunks(inner); part++) {
                const int64_t first = part * CHUNK, last = std::min(inner, first + CHUNK);
                multiply(layer.gate, first, last, normed.data(), B, gates.data(), inner);
                tune(added, 4, B, first, last, gates.data(), inner);
                multiply(layer.up, first, last, normed.data(), B, ups.data(), inner);
                tune(added, 5, B, first, last, ups.data(), inner);
                for (int64_t row = 0; row < B; row++)
                    for (int64_t i = row * inner + first; i < row * inner + last; i++)
                        gates[i] = gates[i] / (1 + std::exp(-gates[i])) * ups[i];  // SiLU
            }
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < chunks(D); part++) {
                const int64_t first = part * CHUNK, last = std::min(D, first + CHUNK);
                multiply(layer.down, first, last, gates.data(), B, sums.data(), D);
                tune(added, 6, B, first, last, sums.data(), D);
                for (int64_t row = 0; row < B; row++)
                    for (int64_t i = first; i < last; i++) step.hidden[row * D + i] += sums[row * D + i];
            }
        }
    }
    std::vector<float> normed(D);
    for (int64_t row = 0; row < B; row++) {
        normalize(step.last, step.hidden + row * D, D, normed.data());
        std::memcpy(step.hidden + row * D, normed.data(), sizeof(float) * D);
    }
}
