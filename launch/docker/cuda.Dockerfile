# grpo-jax on NVIDIA GPUs, whose driver the host has; CUDA itself comes with jax: docker build -f launch/docker/cuda.Dockerfile .
FROM python:3.12-slim
# bubblewrap is the sandbox of the reward 'code'.
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /src/
COPY grpo_jax /src/grpo_jax
COPY configs /src/configs
ARG CUDA=12
RUN pip install --no-cache-dir "/src[cuda${CUDA}]"
WORKDIR /run/grpo_jax
ENTRYPOINT ["grpo-jax"]
