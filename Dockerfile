# The pipeline and Dagster, for the webserver and the daemon of compose.yaml.
#   docker build -t embeddings-pipeline .
# --build-arg TORCH_BACKEND=cu130 …: torch for a GPU, from the indexes that uv knows. For compose.yaml it stands in .env.
FROM python:3.13-slim

ARG TORCH_BACKEND=cpu
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PYTHONUNBUFFERED=1

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY embeddings_pipeline embeddings_pipeline
COPY sql sql
RUN --mount=type=cache,target=/root/.cache \
    pip install --disable-pip-version-check -c constraints.txt uv \
    && uv pip install --system --torch-backend "$TORCH_BACKEND" -c constraints.txt torch==2.13.0 '.[serve]'

# The collections: `defs/` of the checkout that the image is built from. The package itself is the installed one.
RUN mkdir -p /app/home /state && mv embeddings_pipeline/defs /app/home/defs && rm -r embeddings_pipeline sql \
    && useradd --uid 10001 --no-create-home pipeline && chown pipeline:pipeline /state
WORKDIR /app/home
COPY dagster.yaml workspace.yaml ./
COPY examples examples

ENV DAGSTER_HOME=/app/home EMBEDDINGS_STATE_DIR=/state EMBEDDINGS_DEFS_DIR=/app/home/defs HOME=/state
USER pipeline
VOLUME /state
EXPOSE 3000
CMD ["python", "-m", "dagster_webserver", "-h", "0.0.0.0", "-p", "3000", "-w", "workspace.yaml"]
