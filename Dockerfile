# vera-tools without torch: everything but `drift` and `vera_tools.nn`.
#
#     docker build -t vera-tools .
#     docker run --rm -v "$PWD:/data:ro" vera-tools verify my-adapter
#
# It runs as a user without rights and without a home. To write, mount a folder that user 65532 may write to, or name
# yourself: docker run --user "$(id -u):$(id -g)" -v "$PWD:/data" ...

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY schemas ./schemas
COPY fixtures/atlas ./fixtures/atlas
COPY fixtures/architectures ./fixtures/architectures
COPY vera_tools ./vera_tools
RUN python -m venv /opt/vera-tools
RUN PIP_CONSTRAINT=constraints.txt /opt/vera-tools/bin/pip install --no-cache-dir --disable-pip-version-check .
RUN /opt/vera-tools/bin/pip uninstall --yes pip && /opt/vera-tools/bin/python -m compileall -q /opt/vera-tools

FROM python:3.13-slim
COPY --from=build /opt/vera-tools /opt/vera-tools
# The Hub's client keeps its cache there; mount a volume to keep it.
ENV PATH=/opt/vera-tools/bin:$PATH HF_HOME=/tmp/huggingface PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /data
ENTRYPOINT ["vera-tools"]
CMD ["--help"]
