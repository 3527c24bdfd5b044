# CPU:   docker build -t echofocus .
# CUDA:  docker build -t echofocus --build-arg BASE=pytorch/pytorch:TAG .
#        with the tag of a CUDA runtime image that holds the torch of requirements.txt
# Run:   docker run --rm --network none -v "$PWD":/data echofocus check
#        with --gpus all for CUDA, --user "$(id -u)" for files of one's own
ARG BASE=python:3.11-slim
FROM ${BASE}

# An index with CPU-only wheels of torch makes a smaller image; pip's own index holds all the rest.
ARG PIP_EXTRA_INDEX_URL

WORKDIR /opt/echofocus
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps . && rm -rf build

# Weights are cached below HOME: mount a folder there, or download them to /data/trained_models.
ENV HOME=/data
WORKDIR /data
ENTRYPOINT ["echofocus"]
CMD ["--help"]
