# Training image:  docker build -t srunit .
#   docker run --gpus all --ipc host -v "$PWD:/work" -w /work srunit deepspeed /srunit/launch/train.py --task gta2city
# The folder mounted is the one worked in, so that all that a run leaves outlives the container: runs/, scenes drawn into
# data/, and MLflow's mlflow.db and mlartifacts/.
# Without a GPU:  docker build --build-arg TORCH=cpu …, and  docker run -e DS_ACCELERATOR=cpu …
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# A compiler and Python's headers: DeepSpeed and torch.compile build small extensions at first use. ssh and pdsh: the
# deepspeed launcher starts other nodes through them.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ git make openssh-client pdsh python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# Ubuntu 24.04 has a user of id 1000 already; the project's own takes its place, so that mounted folders fit most hosts.
# The folders are where volumes are mounted, which take over their owner.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 srunit \
 && install -d -o srunit -g srunit /srunit \
        /srunit/runs /srunit/mlflow /home/srunit/.cache /home/srunit/.cache/srunit
USER srunit
WORKDIR /srunit

# The dependencies are one layer, rebuilt only when their versions change; the code comes after.
ARG TORCH=cuda
COPY --chown=srunit pyproject.toml constraints.txt ./
COPY --chown=srunit infra/setup.sh infra/
RUN TORCH=$TORCH PIP_NO_CACHE_DIR=1 infra/setup.sh

ENV PATH=/srunit/.venv/bin:$PATH
COPY --chown=srunit . .
RUN touch .venv/.installed

CMD ["python", "launch/train.py", "--help"]
