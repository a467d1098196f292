# grpo-jax on CPUs: docker build -f launch/docker/cpu.Dockerfile .
FROM python:3.12-slim
# bubblewrap is the sandbox of the reward 'code'.
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /src/
COPY grpo_jax /src/grpo_jax
COPY configs /src/configs
RUN pip install --no-cache-dir /src
WORKDIR /run/grpo_jax
ENTRYPOINT ["grpo-jax"]
