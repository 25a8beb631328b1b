# How to build and use it: docs/docker.md. tests/docs/test_dockerfile.py runs these very steps in a clean root.

# The minor version that PyTorch has wheels for and Debian bookworm itself has, so that a test needs no registry.
FROM python:3.11-slim-bookworm AS base
ENV VIRTUAL_ENV=/opt/deltamem
ENV PATH=$VIRTUAL_ENV/bin:$PATH

# A stage of its own: only a change of the requirements, not any of pyproject.toml, installs them again.
FROM base AS requirements
# For instance "cpu": what runs and chats in ONNX Runtime, without PyTorch.
ARG EXTRAS=all
COPY pyproject.toml /
RUN python3 -c "import re, tomllib; p = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
own = lambda extra: [r for line in p['optional-dependencies'][extra] for r in \
(sum(map(own, re.findall(r'\w+', line.partition('[')[2])), []) if line.startswith(p['name']) else [line])]; \
print(*dict.fromkeys(p['dependencies'] + sum(map(own, '$EXTRAS'.split()), [])), sep='\n')" > /requirements.txt

FROM base AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv $VIRTUAL_ENV
COPY --from=requirements /requirements.txt /
COPY constraints.txt /
# Where to take PyTorch from, and PyTorch alone. Its default build has CUDA, its libraries come as packages.
ARG TORCH_INDEX=
RUN torch=$(grep '^torch[<>=]' /requirements.txt || true); \
    if [ -n "$TORCH_INDEX" ] && [ -n "$torch" ]; then \
      pip install --no-deps --constraint /constraints.txt --index-url "$TORCH_INDEX" "$torch"; \
    fi
RUN pip install --constraint /constraints.txt --requirement /requirements.txt

FROM dependencies AS package
WORKDIR /src
COPY pyproject.toml README.md ./
COPY deltamem_tool deltamem_tool
COPY recipes recipes
COPY web/src web/src
RUN pip install --no-deps --prefix /package .

FROM base
LABEL org.opencontainers.image.title=deltamem org.opencontainers.image.licenses=Apache-2.0
# Folders that any user may write to: `--user` gives what is mounted over /work its owner.
RUN useradd --uid 1000 --user-group --home-dir /home/deltamem deltamem \
    && install -d -o deltamem -g deltamem -m 1777 /home/deltamem /huggingface /work
COPY --from=dependencies $VIRTUAL_ENV $VIRTUAL_ENV
COPY --from=package /package $VIRTUAL_ENV
ENV HOME=/home/deltamem HF_HOME=/huggingface
# What `--gpus all` is to bring in, for NVIDIA's container toolkit.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /work
VOLUME /huggingface
# `docker stop` is a Ctrl-C: training keeps what it has.
STOPSIGNAL SIGINT
ENTRYPOINT ["deltamem"]
CMD ["--help"]
