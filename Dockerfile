# CUDA's compiler, PyTorch, this repository with everything built.
#   docker build -t qlora-kernels .
#   docker run qlora-kernels make test
#   docker run --gpus all -v "$PWD/report:/report" -e OUT=/report qlora-kernels bench/gpu.sh
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        binutils g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /qlora-kernels
# Before the build too: without ninja on the path PyTorch compiles one file after the other.
ENV PATH=/qlora-kernels/.venv/bin:$PATH
# The packages first: they stay in the cache while the sources change.
COPY constraints.txt ./
RUN python3 -m venv .venv \
    && python -m pip install --no-cache-dir -c constraints.txt torch triton transformers

COPY . .
RUN make .venv/built

CMD ["make", "test"]
