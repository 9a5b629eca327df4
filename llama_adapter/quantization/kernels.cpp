// Products with quantised matrices, and one decoding step of a LLaMA-like decoder, on a CPU.
//
// Plain C++ with the vector extensions of GCC and Clang: the same lines become AVX2, AVX-512 or NEON. Weights
// are converted to floats in registers. So only the quantised weights are read from memory, and all
// arithmetic is float32.
//
// A matrix has the shape (rows, columns); rows are outputs, columns are inputs. It is stored row by row, and
// each row is cut into blocks of 32 columns. A weight is scale * number + offset. Each block has one scale
// (Q6_K: one for each half of it), and in some formats an offset. The formats of GGUF are read as they are in
// their files: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. A block number below always
// counts blocks of 32 columns, even where the format's own blocks have 256.
//
// A range "first..last" includes first and excludes last. A nibble is half a byte, 4 bits.
//
// Shapes: B rows of a batch, D hidden size, H heads, G key-value heads, d head width, S positions in the
// cache, K prompts.

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
constexpr int64_t CHUNK = 32;  // outputs that a thread computes at a time

typedef float Floats __attribute__((vector_size(32)));

inline Floats load(const float* from) {
    Floats to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// Eight signed bytes as floats. On x86, GCC 12 compiles the plain loop to code that is about ten times
// slower.
inline Floats floats_of(const int8_t* from) {
#ifdef __AVX2__
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Floats to;
    for (int i = 0; i < 8; i++) to[i] = from[i];
    return to;
#endif
}

// The low and the high nibbles of eight bytes as floats.
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

// Eight numbers of 5 or 6 bits, minus `less`. Their lower 4 bits are nibbles of eight bytes, `halves`:
// `shift` is 0 for the low nibbles and 4 for the high ones. Their upper bits come from eight other bytes,
// `tops`, which are shifted right by `top_shift` and then masked.
inline Floats floats_of_bits(const uint8_t* halves, int shift, const uint8_t* tops, int top_shift, int mask, int less) {
#ifdef __AVX2__
    const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(halves)));
    const __m256i top = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(tops)));
    const __m256i number = _mm256_and_si256(_mm256_srl_epi32(low, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(15));
    const __m256i more =
        _mm256_and_si256(_mm256_srl_epi32(top, _mm_cvtsi32_si128(top_shift)), _mm256_set1_epi32(mask));
    return _mm256_cvtepi32_ps(
        _mm256_sub_epi32(_mm256_or_si256(number, _mm256_slli_epi32(more, 4)), _mm256_set1_epi32(less)));
#else
    Floats to;
    for (int i = 0; i < 8; i++)
        to[i] = ((halves[i] >> shift & 15) | (tops[i] >> top_shift & mask) << 4) - less;
    return to;
#endif
}

// Eight numbers of 5 bits, minus `less`. Their lower 4 bits are as above; bit i of `tops` is the fifth of
// number i.
inline Floats floats_of_five(const uint8_t* halves, int shift, uint8_t tops, int less) {
#ifdef __AVX2__
    const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(halves)));
    const __m256i number = _mm256_and_si256(_mm256_srl_epi32(low, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(15));
    const __m256i places = _mm256_setr_epi32(4, 3, 2, 1, 0, 0, 0, 0), back = _mm256_setr_epi32(0, 0, 0, 0, 0, 1, 2, 3);
    const __m256i top = _mm256_srlv_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(tops), places), back);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(
        _mm256_or_si256(number, _mm256_and_si256(top, _mm256_set1_epi32(16))), _mm256_set1_epi32(less)));
#else
    Floats to;
    for (int i = 0; i < 8; i++) to[i] = ((halves[i] >> shift & 15) | (tops >> i & 1) << 4) - less;
    return to;
#endif
}

inline float sum(Floats v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// The value of a float16, given as its bits. It must be finite.
inline float to_float(uint16_t half) {
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    const uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;  // the exponents' biases differ by 112; subnormals come out right too
    return half & 0x8000 ? -value : value;
#endif
}

}  // namespace

// A matrix as Python passes it. `Matrix` in kernels.py must have the same fields.
extern "C" struct Matrix {
    int64_t format;  // 0 float32, 1 int8, 2 int4, 3 to 10 GGUF's (CODES in formats.py)
    int64_t rows, columns;
    const void* numbers;      // GGUF's: (rows, bytes of a row), which include scales and offsets
    const uint16_t* scales;   // float16, (rows, blocks); int8 and int4 only
    const uint16_t* offsets;  // float16, (rows, blocks); int4 only
    const float* bias;        // (rows,) or null
};

namespace {

// The classes below read one row of a matrix. unpack() gives the 32 numbers of a block. scale() and offset()
// turn them into weights: scale * number + offset. If `two_scales` is true, scale() is for the first 16
// numbers and second_scale() for the last 16. number() gives a single number, for a last block that is not
// full.
struct Int8Row {
    const int8_t* numbers;
    const uint16_t* scales;
    Int8Row(const Matrix& m, int64_t row)
        : numbers(static_cast<const int8_t*>(m.numbers) + row * m.columns),
          scales(m.scales + row * ((m.columns + BLOCK - 1) / BLOCK)) {}
    static constexpr bool has_offset = false, two_scales = false;
    inline float scale(int64_t block) const { return to_float(scales[block]); }
    inline float offset(int64_t) const { return 0; }
    inline void unpack(int64_t block, Floats to[4]) const {
        for (int part = 0; part < 4; part++) to[part] = floats_of(numbers + block * BLOCK + part * 8);
    }
    inline float number(int64_t column) const { return numbers[column]; }
};

// Two numbers in each byte. A block has 16 bytes: their low nibbles are its first 16 numbers, their high
// nibbles its last 16.
struct Int4Row {
    const uint8_t* numbers;
    const uint16_t *scales, *offsets;
    Int4Row(const Matrix& m, int64_t row) {
        const int64_t blocks = (m.columns + BLOCK - 1) / BLOCK;
        numbers = static_cast<const uint8_t*>(m.numbers) + row * blocks * BLOCK / 2;
        scales = m.scales + row * blocks;
        offsets = m.offsets + row * blocks;
    }
    static constexpr bool has_offset = true, two_scales = false;
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
    static constexpr bool has_offset = false, two_scales = false;
    inline float scale(int64_t) const { return 1; }
    inline float offset(int64_t) const { return 0; }
    inline void unpack(int64_t block, Floats to[4]) const {
        for (int part = 0; part < 4; part++) to[part] = load(numbers + block * BLOCK + part * 8);
    }
    inline float number(int64_t column) const { return numbers[column]; }
};

// A row as GGUF stores it, in blocks of `Size` weights and `Bytes` bytes. All blocks are full. The comments
// on the structs below list the fields of such a block in their order.
template <int64_t Size, int64_t Bytes>
struct GgufRow {
    const uint8_t* blocks;
    GgufRow(const Matrix& m, int64_t row)
        : blocks(static_cast<const uint8_t*>(m.numbers) + row * (m.columns / Size) * Bytes) {}
    static constexpr bool has_offset = false, two_scales = false;
    inline float number(int64_t) const { return 0; }  // never called: all blocks are full
    inline float offset(int64_t) const { return 0; }

   protected:
    inline const uint8_t* at(int64_t block) const { return blocks + block * BLOCK / Size * Bytes; }
    static inline float half(const uint8_t* from) {
        uint16_t bits;
        std::memcpy(&bits, from, sizeof bits);
        return to_float(bits);
    }
};

struct Q8_0Row : GgufRow<32, 34> {  // scale, 32 numbers
    using GgufRow::GgufRow;
    inline float scale(int64_t block) const { return half(at(block)); }
    inline void unpack(int64_t block, Floats to[4]) const {
        const int8_t* numbers = reinterpret_cast<const int8_t*>(at(block) + 2);
        for (int part = 0; part < 4; part++) to[part] = floats_of(numbers + part * 8);
    }
};

struct Q4_0Row : GgufRow<32, 18> {  // scale, 16 bytes of nibbles
    using GgufRow::GgufRow;
    inline float scale(int64_t block) const { return half(at(block)); }
    inline void unpack(int64_t block, Floats to[4]) const {
        for (int part = 0; part < 2; part++) {
            floats_of_halves(at(block) + 2 + part * 8, to[part], to[part + 2]);
            to[part] -= 8;
            to[part + 2] -= 8;
        }
    }
};

struct Q4_1Row : GgufRow<32, 20> {  // scale, offset, 16 bytes of nibbles
    using GgufRow::GgufRow;
    static constexpr bool has_offset = true;
    inline float scale(int64_t block) const { return half(at(block)); }
    inline float offset(int64_t block) const { return half(at(block) + 2); }
    inline void unpack(int64_t block, Floats to[4]) const {
        for (int part = 0; part < 2; part++)
            floats_of_halves(at(block) + 4 + part * 8, to[part], to[part + 2]);
    }
};

struct Q5_0Row : GgufRow<32, 22> {  // scale, 4 bytes of fifth bits, 16 bytes of nibbles
    using GgufRow::GgufRow;
    inline float scale(int64_t block) const { return half(at(block)); }
    inline void unpack(int64_t block, Floats to[4]) const {
        const uint8_t* from = at(block);
        for (int part = 0; part < 4; part++)
            to[part] = floats_of_five(from + 6 + part % 2 * 8, part / 2 * 4, from[2 + part], 16);
    }
};

struct Q5_1Row : GgufRow<32, 24> {  // scale, offset, 4 bytes of fifth bits, 16 bytes of nibbles
    using GgufRow::GgufRow;
    static constexpr bool has_offset = true;
    inline float scale(int64_t block) const { return half(at(block)); }
    inline float offset(int64_t block) const { return half(at(block) + 2); }
    inline void unpack(int64_t block, Floats to[4]) const {
        const uint8_t* from = at(block);
        for (int part = 0; part < 4; part++)
            to[part] = floats_of_five(from + 8 + part % 2 * 8, part / 2 * 4, from[4 + part], 0);
    }
};

// Q4_K and Q5_K have blocks of 256 weights, in 8 parts of 32. A block starts with two float16, d and e. Then
// 12 bytes hold two 6-bit integers for each part, s and t. The part's scale is d * s and its offset -e * t.
// The weights follow.
template <int64_t Bytes>
struct FourBitScales : GgufRow<256, Bytes> {
    using GgufRow<256, Bytes>::GgufRow;
    static constexpr bool has_offset = true;
    inline float scale(int64_t block) const {
        const uint8_t* from = this->at(block / 8 * 8);
        const uint8_t* packed = from + 4;
        const int64_t j = block % 8;
        const int six = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
        return this->half(from) * static_cast<float>(six);
    }
    inline float offset(int64_t block) const {
        const uint8_t* from = this->at(block / 8 * 8);
        const uint8_t* packed = from + 4;
        const int64_t j = block % 8;
        const int six = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4;
        return -(this->half(from + 2) * static_cast<float>(six));
    }
};

struct Q4_KRow : FourBitScales<144> {  // scales and offsets, 128 bytes of nibbles
    using FourBitScales::FourBitScales;
    inline void unpack(int64_t block, Floats to[4]) const {
        const uint8_t* from = at(block / 8 * 8) + 16 + block % 8 / 2 * 32;
        for (int part = 0; part < 4; part++) {
            Floats low, high;
            floats_of_halves(from + part * 8, low, high);
            to[part] = block % 2 ? high : low;
        }
    }
};

struct Q5_KRow : FourBitScales<176> {  // scales and offsets, 32 bytes of fifth bits, 128 bytes of nibbles
    using FourBitScales::FourBitScales;
    inline void unpack(int64_t block, Floats to[4]) const {
        const uint8_t* from = at(block / 8 * 8);
        const int64_t j = block % 8;
        for (int part = 0; part < 4; part++)
            to[part] = floats_of_bits(from + 48 + j / 2 * 32 + part * 8, j % 2 * 4, from + 16 + part * 8, j, 1, 0);
    }
};

struct Q6_KRow : GgufRow<256, 210> {  // 128 bytes of nibbles, 64 of upper 2 bits, 16 int8 scales, one float16
    using GgufRow::GgufRow;
    static constexpr bool two_scales = true;
    inline float scale(int64_t block) const { return scale_of(block, 0); }
    inline float second_scale(int64_t block) const { return scale_of(block, 1); }
    inline void unpack(int64_t block, Floats to[4]) const {
        const uint8_t* from = at(block / 8 * 8);
        const int64_t j = block % 8, side = j / 4, k = j % 4;
        const uint8_t *halves = from + side * 64 + k % 2 * 32, *pairs = from + 128 + side * 32;
        for (int part = 0; part < 4; part++)
            to[part] = floats_of_bits(halves + part * 8, k / 2 * 4, pairs + part * 8, k * 2, 3, 32);
    }

   private:
    inline float scale_of(int64_t block, int64_t side) const {
        const uint8_t* from = at(block / 8 * 8);
        return half(from + 208) * static_cast<float>(reinterpret_cast<const int8_t*>(from + 192)[block % 8 * 2 + side]);
    }
};

// The dot products of one row of a matrix with T vectors: to[t] = row . x[t]
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
            if constexpr (Row::two_scales)
                total[t] += (numbers[0] * x0 + numbers[1] * x1) * scale +
                            (numbers[2] * x2 + numbers[3] * x3) * row.second_scale(block);
            else
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

// Outputs first..last of a matrix for `count` vectors: y[t * stride + row] = row . x[t] + bias.
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
        case 3: return product<Q8_0Row>(m, first, last, x, count, y, stride);
        case 4: return product<Q4_0Row>(m, first, last, x, count, y, stride);
        case 5: return product<Q4_1Row>(m, first, last, x, count, y, stride);
        case 6: return product<Q5_0Row>(m, first, last, x, count, y, stride);
        case 7: return product<Q5_1Row>(m, first, last, x, count, y, stride);
        case 8: return product<Q4_KRow>(m, first, last, x, count, y, stride);
        case 9: return product<Q5_KRow>(m, first, last, x, count, y, stride);
        case 10: return product<Q6_KRow>(m, first, last, x, count, y, stride);
    }
}

// The 32 weights of a full block, as floats.
template <class Row>
inline void expand_block(const Row& weights, int64_t block, Floats to[4]) {
    weights.unpack(block, to);
    const float scale = weights.scale(block), offset = weights.offset(block);
    float second = scale;
    if constexpr (Row::two_scales) second = weights.second_scale(block);
    for (int part = 0; part < 4; part++) {
        to[part] *= part < 2 ? scale : second;
        if (Row::has_offset) to[part] += offset;
    }
}

// One weight of a last block that is not full, as a float.
template <class Row>
inline float expand_one(const Row& weights, int64_t column) {
    return weights.number(column) * weights.scale(column / BLOCK) + weights.offset(column / BLOCK);
}

// A whole row, as floats.
template <class Row>
void expand(const Matrix& m, int64_t row, float* to) {
    const Row weights(m, row);
    const int64_t whole = m.columns / BLOCK;
    for (int64_t block = 0; block < whole; block++) {
        Floats values[4];
        expand_block(weights, block, values);
        std::memcpy(to + block * BLOCK, values, sizeof values);
    }
    for (int64_t column = whole * BLOCK; column < m.columns; column++) to[column] = expand_one(weights, column);
}

int64_t chunks(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }

}  // namespace

// y = x @ matrix.T + bias, for few vectors: x (count, columns), y (count, rows).
extern "C" void linear(const Matrix* m, const float* x, int64_t count, float* y, int64_t threads) {
    const int64_t parts = chunks(m->rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++)
        multiply(*m, part * CHUNK, std::min(m->rows, (part + 1) * CHUNK), x, count, y, m->rows);
}

// Rows first..last of the matrix, as floats: to (last - first, columns).
extern "C" void dequantize(const Matrix* m, int64_t first, int64_t last, float* to, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads) if (threads > 1)
    for (int64_t row = first; row < last; row++) {
        float* out = to + (row - first) * m->columns;
        switch (m->format) {
            case 0: expand<FloatRow>(*m, row, out); break;
            case 1: expand<Int8Row>(*m, row, out); break;
            case 2: expand<Int4Row>(*m, row, out); break;
            case 3: expand<Q8_0Row>(*m, row, out); break;
            case 4: expand<Q4_0Row>(*m, row, out); break;
            case 5: expand<Q4_1Row>(*m, row, out); break;
            case 6: expand<Q5_0Row>(*m, row, out); break;
            case 7: expand<Q5_1Row>(*m, row, out); break;
            case 8: expand<Q4_KRow>(*m, row, out); break;
            case 9: expand<Q5_KRow>(*m, row, out); break;
            case 10: expand<Q6_KRow>(*m, row, out); break;
        }
    }
}

// --- products with many vectors ------------------------------------------------------------------------------
//
// A blocked matrix product (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008)
// with quantised weights. It converts a small panel of weights to floats and multiplies the panel by all
// vectors while it is in the processor's cache. A library's product needs all weights as floats in memory;
// this one does not.
//
// It is compiled for AVX2 and AVX-512 only. On other processors callers use torch's product.

#if defined(__AVX2__) && defined(__FMA__)

namespace {

#ifdef __AVX512F__
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t TILE = 12;  // vectors whose sums are kept in registers, 2 `Lanes` of outputs each
#else
typedef float Lanes __attribute__((vector_size(32)));
constexpr int64_t TILE = 6;
#endif
typedef Lanes Anywhere __attribute__((aligned(4), may_alias));
constexpr int64_t WIDTH = sizeof(Lanes) / sizeof(float);
constexpr int64_t PANEL = 2 * WIDTH;  // outputs in a panel
constexpr int64_t DEPTH = 384;        // inputs in a panel, at most

// Transposes 8 x 8 floats in place.
inline void transpose(Floats v[8]) {
    Floats pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

// The address of a weight in the panels of 32 outputs, which lie one after the other: from input `k` to
// output `j` of the 32.
inline float* place(float* panels, int64_t k, int64_t j) {
    return panels + (j / PANEL * DEPTH + k) * PANEL + j % PANEL;
}

// Fills the panels for x @ W.T: outputs are 32 rows of the matrix, from `row` on; inputs are its columns
// first..last.
template <class Row>
void fill_from_rows(const Matrix& m, int64_t row, int64_t first, int64_t last, float* panels) {
    const int64_t whole = last / BLOCK;
    for (int64_t j = 0; j < CHUNK; j += 8) {
        for (int64_t block = first / BLOCK; block < whole; block++) {
            Floats values[8][4];
            for (int64_t i = 0; i < 8; i++)
                if (row + j + i < m.rows)
                    expand_block(Row(m, row + j + i), block, values[i]);
                else
                    std::memset(values[i], 0, sizeof values[i]);
            for (int part = 0; part < 4; part++) {
                Floats square[8];
                for (int i = 0; i < 8; i++) square[i] = values[i][part];
                transpose(square);
                for (int i = 0; i < 8; i++)
                    *reinterpret_cast<Floats*>(place(panels, block * BLOCK - first + part * 8 + i, j)) = square[i];
            }
        }
        for (int64_t column = whole * BLOCK; column < last; column++)
            for (int64_t i = 0; i < 8; i++)
                *place(panels, column - first, j + i) =
                    row + j + i < m.rows ? expand_one(Row(m, row + j + i), column) : 0;
    }
}

// Fills the panels for x @ W: outputs are 32 columns of the matrix, from `column` on; inputs are its rows
// first..last.
template <class Row>
void fill_from_columns(const Matrix& m, int64_t column, int64_t first, int64_t last, float* panels) {
    for (int64_t row = first; row < last; row++) {
        const Row weights(m, row);
        if (column + BLOCK <= m.columns) {
            Floats values[4];
            expand_block(weights, column / BLOCK, values);
            for (int part = 0; part < 4; part++)
                *reinterpret_cast<Floats*>(place(panels, row - first, part * 8)) = values[part];
        } else {
            for (int64_t j = 0; j < BLOCK; j++)
                *place(panels, row - first, j) = column + j < m.columns ? expand_one(weights, column + j) : 0;
        }
    }
}

// Multiplies TILE vectors of x, (TILE, depth), by a panel, (depth, PANEL). The products are added to the bias
// if one is given, else to y, and stored in y. At the edges of y only `rows` of the TILE vectors and
// `columns` of the PANEL outputs exist.
inline void multiply_tile(const float* x, const float* panel, int64_t depth, const float* bias, float* y,
                          int64_t stride, int64_t rows, int64_t columns) {
    constexpr int64_t LINE = 16;  // floats in a line of the cache
    for (int64_t i = 0; i < rows; i++) __builtin_prefetch(y + i * stride, 1);
    Lanes left[TILE] = {}, right[TILE] = {};
    for (int64_t start = 0; start < depth; start += LINE) {
#pragma GCC unroll 12
        for (int64_t i = 0; i < TILE; i++) __builtin_prefetch(x + (TILE + i) * DEPTH + start);  // the next tile
        for (int64_t k = start; k < std::min(depth, start + LINE); k++) {
            const Lanes* weights = reinterpret_cast<const Lanes*>(panel + k * PANEL);
#pragma GCC unroll 12
            for (int64_t i = 0; i < TILE; i++) {
                left[i] += x[i * DEPTH + k] * weights[0];
                right[i] += x[i * DEPTH + k] * weights[1];
            }
        }
    }
    if (rows == TILE && columns == PANEL) {
#pragma GCC unroll 12
        for (int64_t i = 0; i < TILE; i++) {
            Anywhere* to = reinterpret_cast<Anywhere*>(y + i * stride);
            const Anywhere* from = bias ? reinterpret_cast<const Anywhere*>(bias) : to;
            to[0] = left[i] + from[0];
            to[1] = right[i] + from[1];
        }
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            y[i * stride + j] =
                (j < WIDTH ? left[i][j] : right[i][j - WIDTH]) + (bias ? bias[j] : y[i * stride + j]);
}

typedef void (*Fill)(const Matrix&, int64_t, int64_t, int64_t, float*);

// y (count, outputs) = x (count, inputs) times the panels that `fill` makes of the matrix, plus the bias.
void multiply_panels(const Matrix& m, Fill fill, const float* x, int64_t count, int64_t inputs, float* y,
                     int64_t outputs, const float* bias, int64_t threads) {
    const int64_t parts = (inputs + DEPTH - 1) / DEPTH;  // of the inputs, as equal as whole blocks allow
    const int64_t step = ((inputs + parts - 1) / parts + BLOCK - 1) / BLOCK * BLOCK;
    std::vector<float> copied((count + TILE - 1) / TILE * TILE * DEPTH);  // a part of every vector
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        alignas(64) float panels[CHUNK * DEPTH];
        for (int64_t first = 0; first < inputs; first += step) {
            const int64_t last = std::min(inputs, first + step);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count; t++)
                std::memcpy(copied.data() + t * DEPTH, x + t * inputs + first, sizeof(float) * (last - first));
#pragma omp for schedule(dynamic)
            for (int64_t chunk = 0; chunk < chunks(outputs); chunk++) {
                const int64_t from = chunk * CHUNK;
                fill(m, from, first, last, panels);
                for (int64_t j = 0; j < CHUNK && from + j < outputs; j += PANEL) {
                    const int64_t columns = std::min(PANEL, outputs - from - j);
                    float start[PANEL] = {};
                    if (bias) std::memcpy(start, bias + from + j, sizeof(float) * columns);
                    for (int64_t t = 0; t < count; t += TILE)
                        multiply_tile(copied.data() + t * DEPTH, place(panels, 0, j), last - first,
                                      first ? nullptr : start, y + t * outputs + from + j, outputs,
                                      std::min(TILE, count - t), columns);
                }
            }
        }
    }
}

template <class Row>
void multiply_many(const Matrix& m, const float* x, int64_t count, float* y, bool transposed, int64_t threads) {
    if (transposed)
        multiply_panels(m, fill_from_rows<Row>, x, count, m.columns, y, m.rows, m.bias, threads);
    else
        multiply_panels(m, fill_from_columns<Row>, x, count, m.rows, y, m.columns, nullptr, threads);
}

}  // namespace

// Products with many vectors. If `transposed`: y = x @ matrix.T + bias, x (count, columns), y (count, rows),
// as `linear`. Else, for the backward pass: y = x @ matrix, x (count, rows), y (count, columns).
extern "C" void multiply_many(const Matrix* m, const float* x, int64_t count, float* y, int64_t transposed,
                              int64_t threads) {
    switch (m->format) {
        case 0: return multiply_many<FloatRow>(*m, x, count, y, transposed, threads);
        case 1: return multiply_many<Int8Row>(*m, x, count, y, transposed, threads);
        case 2: return multiply_many<Int4Row>(*m, x, count, y, transposed, threads);
        case 3: return multiply_many<Q8_0Row>(*m, x, count, y, transposed, threads);
        case 4: return multiply_many<Q4_0Row>(*m, x, count, y, transposed, threads);
        case 5: return multiply_many<Q4_1Row>(*m, x, count, y, transposed, threads);
        case 6: return multiply_many<Q5_0Row>(*m, x, count, y, transposed, threads);
        case 7: return multiply_many<Q5_1Row>(*m, x, count, y, transposed, threads);
        case 8: return multiply_many<Q4_KRow>(*m, x, count, y, transposed, threads);
        case 9: return multiply_many<Q5_KRow>(*m, x, count, y, transposed, threads);
        case 10: return multiply_many<Q6_KRow>(*m, x, count, y, transposed, threads);
    }
}

#endif

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

// A tensor of an adapter. Either all rows of the batch share it, or each has its own.
extern "C" struct Rows {
    const float* start;  // null: there is none
    int64_t stride;      // floats from one row of the batch to the next; 0: all rows share it
    const float* of(int64_t row) const { return start + row * stride; }
};

// Additional keys and values that belong to no token (prompts or a prefix). Their keys have no rotary
// embedding.
extern "C" struct More {
    Rows keys, values;  // (1 or B, H or G, K, d)
    int64_t count;      // K
    const bool* mask;   // (1 or B, K), false at padding; null: there is none
    int64_t mask_stride;
};

// One thing that an adapter does at a site (a projection, the attention or the MLP) with input x and output
// y. It replaces y by
//
//     y + scale * y + bias + up f(down z + down_bias)
//
// where z is x or y, and f the identity or GELU. Tensors that are null are left out.
extern "C" struct Term {
    Rows scale, bias;      // (1 or B, outputs)
    Rows down, down_bias;  // (1 or B, rank, inputs), (1 or B, rank)
    Rows up;               // (1 or B, rank, outputs)
    int64_t rank, inputs, outputs;
    int64_t place;  // where its `rank` values of f(...) start among those of all terms of the layer
    int64_t reads_output, gelu;  // z is y, not x (never at a projection); f is GELU
};

// What an adapter adds to one layer.
extern "C" struct Added {
    More prompts;       // (H, K, d), in a softmax of their own; the values are multiplied by the gates
    More prefix;        // (G, K, d), in the same softmax as the tokens
    const Term* terms;  // of all sites, one site after the other
    int64_t first[10];  // each site's first term, and the number of terms. The sites: the projections in
                        // the order of Layer, the attention, the MLP
};

extern "C" struct Step {
    int64_t rows, threads;                // B
    int64_t heads, key_heads, head_dim;   // H, G, d
    int64_t hidden_size, layers;          // D
    int64_t length, capacity;             // S before this step; for how many positions the cache has room
    const int64_t* starts;                // (B,) the first position of each row that is not padding
    const float *cosines, *sines;         // (B, d)
    float* const* keys;                   // of each layer, (B, G, capacity, d)
    float* const* values;
    const Added* added;                   // of each layer; null: there is no adapter
    int64_t ranks;                        // the sum of a layer's ranks, in the layer where it is largest
    float* hidden;                        // (B, D): first the embeddings, at the end the last norm's output
    Norm last;
};

namespace {

// Root-mean-square norm of x (size,).
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

// Rotary embedding of x (d,), which is normalised first if there is a norm. Element i is rotated together
// with element i + d / 2.
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

// Softmax in place. A score of -inf becomes 0.
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

// The scores of a query with additional keys. They are -inf at padding.
void score(const More& more, int64_t row, int64_t head, const float* query, int64_t d, float scaling, float* to) {
    const float* keys = more.keys.of(row) + head * more.count * d;
    const bool* mask = more.mask ? more.mask + row * more.mask_stride : nullptr;
    for (int64_t i = 0; i < more.count; i++)
        to[i] = mask && !mask[i] ? -INFINITY : dot_floats(query, keys + i * d, d) * scaling;
}

// Adds the values of additional keys to `to`, multiplied by `weights`.
void read(const More& more, int64_t row, int64_t head, const float* weights, int64_t d, float* to) {
    const float* values = more.values.of(row) + head * more.count * d;
    for (int64_t i = 0; i < more.count; i++) add_scaled(to, values + i * d, weights[i], d);
}

// The attention of one head in one row of the batch: over the tokens and the prefix, plus that over the
// prompts. Heads that share a key each rotate it themselves, so that none waits for another. The first of
// them writes it to the cache.
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
    const int64_t front = added ? added->prefix.count : 0, prompts = added ? added->prompts.count : 0;
    scores.resize(std::max(front + count, prompts));
    float* own = scores.data() + front;  // the tokens' scores
    if (front) score(added->prefix, row, group, query, d, scaling, scores.data());
    for (int64_t i = 0; i + 1 < count; i++) own[i] = dot_floats(query, keys + (start + i) * d, d) * scaling;
    own[count - 1] = dot_floats(query, key, d) * scaling;
    softmax(scores.data(), front + count);
    std::fill(to, to + d, 0.0f);
    if (front) read(added->prefix, row, group, scores.data(), d, to);
    for (int64_t i = 0; i + 1 < count; i++) add_scaled(to, values + (start + i) * d, own[i], d);
    add_scaled(to, v, own[count - 1], d);
    if (!prompts) return;
    score(added->prompts, row, head, query, d, scaling, scores.data());
    softmax(scores.data(), prompts);
    read(added->prompts, row, head, scores.data(), d, to);
}

constexpr int ATTENTION = 7, MLP = 8;  // the sites after the projections, 0 to 6 (see Added)

// f(down z + down_bias) of a term for every row of the batch, z (B, inputs), into `to` (B, ranks). The
// threads share the ranks out and do not wait for each other at the end.
void reduce(const Step& step, const Term& term, const float* z, float* to) {
    Matrix m{0, term.rank, term.inputs, nullptr, nullptr, nullptr, nullptr};
    const bool same = !term.down.stride && !term.down_bias.stride;
    const int64_t sets = same ? 1 : step.rows, rows = same ? step.rows : 1;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < term.rank; i++)
        for (int64_t set = 0; set < sets; set++) {
            float* out = to + set * step.ranks + term.place;
            m.numbers = term.down.of(set);
            m.bias = term.down_bias.start ? term.down_bias.of(set) : nullptr;
            multiply(m, i, i + 1, z + set * term.inputs, rows, out, step.ranks);
            if (term.gelu)
                for (int64_t row = 0; row < rows; row++) {
                    float& value = out[row * step.ranks + i];
                    value *= 0.5f * (1 + std::erf(value * 0.70710678f));
                }
        }
}

// The same for all terms of a projection. If it returns true, `to` has new values, and the threads have to
// wait for each other before they read them.
bool reduce_all(const Step& step, const Added* added, int site, const float* x, float* to) {
    bool any = false;
    for (int64_t i = added ? added->first[site] : 0; added && i < added->first[site + 1]; i++) {
        if (!added->terms[i].rank) continue;
        reduce(step, added->terms[i], x, to);
        any = true;
    }
    return any;
}

// Applies a term to outputs first..last of its site, y (B, y_stride), in place. `reduced` has the values of
// f(...).
void apply(const Step& step, const Term& term, const float* reduced, int64_t first, int64_t last, float* y,
           int64_t y_stride) {
    for (int64_t row = 0; row < step.rows; row++) {
        float* out = y + row * y_stride;
        if (term.scale.start) {
            const float* scale = term.scale.of(row);
            for (int64_t i = first; i < last; i++) out[i] += scale[i] * out[i];
        }
        if (term.bias.start) add_scaled(out + first, term.bias.of(row) + first, 1, last - first);
        const float* own = reduced + row * step.ranks + term.place;
        for (int64_t i = 0; i < term.rank; i++)
            add_scaled(out + first, term.up.of(row) + i * term.outputs + first, own[i], last - first);
    }
}

void apply_all(const Step& step, const Added* added, int site, const float* reduced, int64_t first, int64_t last,
               float* y, int64_t y_stride) {
    for (int64_t i = added ? added->first[site] : 0; added && i < added->first[site + 1]; i++)
        apply(step, added->terms[i], reduced, first, last, y, y_stride);
}

// Applies all terms of a sub-layer (the attention or the MLP) with input x and output y, (B, D) each. The
// threads wait for each other inside.
void apply_to_sublayer(const Step& step, const Added* added, int site, const float* x, float* y, float* reduced) {
    for (int64_t i = added ? added->first[site] : 0; added && i < added->first[site + 1]; i++) {
        const Term& term = added->terms[i];
        reduce(step, term, term.reads_output ? y : x, reduced);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t part = 0; part < chunks(step.hidden_size); part++)
            apply(step, term, reduced, part * CHUNK, std::min(step.hidden_size, (part + 1) * CHUNK), y,
                  step.hidden_size);
    }
}

// Adds sums (B, D) to the hidden states, in columns first..last.
void add_columns(const Step& step, const float* sums, int64_t first, int64_t last) {
    for (int64_t row = 0; row < step.rows; row++)
        add_scaled(step.hidden + row * step.hidden_size + first, sums + row * step.hidden_size + first, 1,
                   last - first);
}

}  // namespace

// Takes one token of every row through all layers and the last norm. The cache must have room for it.
extern "C" void decode(const Layer* layers, const Step* given) {
    const Step& step = *given;
    const int64_t B = step.rows, D = step.hidden_size, d = step.head_dim;
    const int64_t width = (step.heads + 2 * step.key_heads) * d, read = step.heads * d;
    int64_t widest = 0;
    for (int64_t i = 0; i < step.layers; i++) widest = std::max(widest, layers[i].gate.rows);
    std::vector<float> projected(B * width), attended(B * read), gates(B * widest), ups(B * widest), sums(B * D);
    std::vector<float> all_reduced(B * step.ranks);
    float* reduced = all_reduced.data();
#pragma omp parallel num_threads(step.threads) if (step.threads > 1)
    {
        std::vector<float> normed(B * D), scores;
        for (int64_t index = 0; index < step.layers; index++) {
            const Layer& layer = layers[index];
            const Added* added = step.added ? step.added + index : nullptr;
            for (int64_t row = 0; row < B; row++)
                normalize(layer.before_attention, step.hidden + row * D, D, normed.data() + row * D);
            bool wait = false;
            for (int site = 0; site < 3; site++) wait |= reduce_all(step, added, site, normed.data(), reduced);
            if (wait) {
#pragma omp barrier
            }
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
                apply_all(step, added, which, reduced, first, last, projected.data() + before, width);
            }
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < B * step.heads; part++) {
                const int64_t row = part / step.heads, head = part % step.heads;
                attend(step, layer, index, row, head, projected.data() + row * width, scores,
                       attended.data() + row * read + head * d);
            }
            if (reduce_all(step, added, 3, attended.data(), reduced)) {
#pragma omp barrier
            }
            const bool behind_attention = added && added->first[ATTENTION] < added->first[ATTENTION + 1];
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < chunks(D); part++) {
                const int64_t first = part * CHUNK, last = std::min(D, first + CHUNK);
                multiply(layer.o, first, last, attended.data(), B, sums.data(), D);
                apply_all(step, added, 3, reduced, first, last, sums.data(), D);
                if (!behind_attention) add_columns(step, sums.data(), first, last);
            }
            if (behind_attention) {
                apply_to_sublayer(step, added, ATTENTION, normed.data(), sums.data(), reduced);
#pragma omp for schedule(static)
                for (int64_t part = 0; part < chunks(D); part++)
                    add_columns(step, sums.data(), part * CHUNK, std::min(D, (part + 1) * CHUNK));
            }
            for (int64_t row = 0; row < B; row++)
                normalize(layer.before_mlp, step.hidden + row * D, D, normed.data() + row * D);
            wait = reduce_all(step, added, 4, normed.data(), reduced);
            wait |= reduce_all(step, added, 5, normed.data(), reduced);
            if (wait) {
#pragma omp barrier
            }
            const int64_t inner = layer.gate.rows;
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < chunks(inner); part++) {
                const int64_t first = part * CHUNK, last = std::min(inner, first + CHUNK);
                multiply(layer.gate, first, last, normed.data(), B, gates.data(), inner);
                apply_all(step, added, 4, reduced, first, last, gates.data(), inner);
                multiply(layer.up, first, last, normed.data(), B, ups.data(), inner);
                apply_all(step, added, 5, reduced, first, last, ups.data(), inner);
                for (int64_t row = 0; row < B; row++)
                    for (int64_t i = row * inner + first; i < row * inner + last; i++)
                        gates[i] = gates[i] / (1 + std::exp(-gates[i])) * ups[i];  // SiLU
            }
            if (reduce_all(step, added, 6, gates.data(), reduced)) {
#pragma omp barrier
            }
            const bool behind_mlp = added && added->first[MLP] < added->first[MLP + 1];
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < chunks(D); part++) {
                const int64_t first = part * CHUNK, last = std::min(D, first + CHUNK);
                multiply(layer.down, first, last, gates.data(), B, sums.data(), D);
                apply_all(step, added, 6, reduced, first, last, sums.data(), D);
                if (!behind_mlp) add_columns(step, sums.data(), first, last);
            }
            if (behind_mlp) {
                apply_to_sublayer(step, added, MLP, normed.data(), sums.data(), reduced);
#pragma omp for schedule(static)
                for (int64_t part = 0; part < chunks(D); part++)
                    add_columns(step, sums.data(), part * CHUNK, std::min(D, (part + 1) * CHUNK));
            }
        }
    }
    std::vector<float> normed(D);
    for (int64_t row = 0; row < B; row++) {
        normalize(step.last, step.hidden + row * D, D, normed.data());
        std::memcpy(step.hidden + row * D, normed.data(), sizeof(float) * D);
    }
}
