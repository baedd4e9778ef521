# lopt-edge in a container, for a CPU or an NVIDIA GPU.
#
#   docker build -t lopt-edge .                                               torch for CUDA (also runs without a GPU)
#   docker build -t lopt-edge --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .      a CPU alone: 2 GB less
#   docker run --gpus all --shm-size 1g -v "$PWD:/work" -v lopt-edge-cache:/cache lopt-edge finetune run.yaml
#
# Paths in settings are those below /work. The cache holds 4-bit copies and what comes from the hub; page files lie beside
# the output, so on your disk. Docker's memory limit (-m) is seen and kept to.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface HOME=/cache

WORKDIR /opt/lopt-edge
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY lopt_edge lopt_edge
COPY quant quant
RUN pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" .

WORKDIR /work
VOLUME /cache
ENTRYPOINT ["lopt-edge"]
CMD ["--help"]
