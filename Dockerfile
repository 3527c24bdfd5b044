# CPU:   docker build -t echofocus .
# CUDA:  docker build -t echofocus --build-arg BASE=pytorch/pytorch:TAG .
#        TAG is a CUDA runtime image with the torch version of requirements.txt
# Run:   docker run --rm --network none -v "$PWD":/data echofocus check
#        add --gpus all for CUDA, --user "$(id -u)" to own the output files
ARG BASE=python:3.11-slim
FROM ${BASE}

# Set this to an index with CPU-only wheels of torch for a smaller image.
ARG PIP_EXTRA_INDEX_URL

WORKDIR /opt/echofocus
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps . && rm -rf build

# Weights are cached in HOME, which is the mounted folder.
ENV HOME=/data
WORKDIR /data
ENTRYPOINT ["echofocus"]
CMD ["--help"]
