# Serves a catalogue over HTTP, or answers the challenge: a folder of queries in, a csv out. On a GPU where the host lends one.
#
#   docker build -t beauty_bafe .
#   docker run --rm --gpus all -v RUN/checkpoints:/checkpoints:ro -v GALLERY:/gallery:ro \
#     -v QUERIES:/queries:ro -v ANSWERS:/answers beauty_bafe /queries /answers/submission.csv
#   docker run --rm --gpus all -v RUN/checkpoints:/checkpoints:ro -v GALLERY:/gallery:ro \
#     -v beauty_bafe_shop:/shop -e BEAUTY_BAFE_TOKEN -p 8000:8000 beauty_bafe serve
#
# compose.yaml serves with Prometheus beside it. PyTorch's and FAISS's wheels bring their CUDA libraries along; the host brings
# the driver.
FROM python:3.11-slim-bookworm

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 NO_ALBUMENTATIONS_UPDATE=1 HF_HUB_OFFLINE=1 MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba
WORKDIR /app

COPY pyproject.toml constraints.txt README.md ./
COPY beauty_bafe ./beauty_bafe
COPY conf ./conf
RUN pip install --constraint constraints.txt '.[serve]'
COPY train.py retrieve.py docker-entrypoint.sh ./

# Volumes take over the owner of the folder that they are mounted on.
RUN useradd --create-home --uid 1000 shopper && mkdir /answers /shop && chown shopper /answers /shop
USER shopper
EXPOSE 8000
ENTRYPOINT ["/bin/sh", "/app/docker-entrypoint.sh"]
CMD ["/queries", "/answers/submission.csv"]
