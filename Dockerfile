# The page in a container.
#   docker build -t llama-adapter .                                    CUDA; runs on a CPU as well
#   docker build -t llama-adapter --build-arg TORCH_INDEX=URL .        CPU only and 4 GB smaller: URL is the
#                                                                      index of PyTorch's CPU wheels
#   docker run -p 7860:7860 [--gpus all] llama-adapter
FROM python:3.12-slim

# The compiler builds the int8 products at the first start.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=""
# There is no git history in the image to take the version from.
ARG VERSION=0.1.0
ENV SETUPTOOLS_SCM_PRETEND_VERSION=$VERSION
WORKDIR /app
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY llama_adapter llama_adapter
COPY weights weights
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
      $(grep -hE '^torch(vision)?==' constraints.txt | grep -v "< '3.11'" | cut -d' ' -f1) \
 && pip install --no-cache-dir -c constraints.txt '.[demo]' \
 && useradd --create-home page
# The page reads what strangers send, so it does not run as root.
USER page
RUN llama-adapter fetch
EXPOSE 7860
CMD ["llama-adapter", "demo", "--host", "0.0.0.0"]
