# The challenge's image: a folder of queries in, a csv out, on a GPU where the host lends one.
#
#   docker build -t beauty_bafe .
#   docker run --rm --gpus all -v RUN/checkpoints:/checkpoints:ro -v GALLERY:/gallery:ro \
#     -v QUERIES:/queries:ro -v ANSWERS:/answers beauty_bafe /queries /answers/submission.csv
#
# PyTorch's and FAISS's wheels bring their CUDA libraries along; the host brings the driver.
FROM python:3.11-slim-bookworm

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 NO_ALBUMENTATIONS_UPDATE=1 HF_HUB_OFFLINE=1 MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /app

COPY pyproject.toml constraints.txt README.md ./
COPY beauty_bafe ./beauty_bafe
COPY conf ./conf
RUN pip install --constraint constraints.txt .
COPY train.py retrieve.py docker-entrypoint.sh ./

RUN useradd --create-home --uid 1000 shopper && mkdir /answers && chown shopper /answers
USER shopper
ENTRYPOINT ["/bin/sh", "/app/docker-entrypoint.sh"]
CMD ["/queries", "/answers/submission.csv"]
