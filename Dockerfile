# CPU image: evaluation, embedding, export, the demos, small trainings.
#   docker build -t arcface-paddle .
#   docker run --rm arcface-paddle python tools/doctor.py --data /tmp
# Mount your folders: -v /data:/opt/arcface/data -v "$PWD/work_dirs":/opt/arcface/work_dirs
FROM python:3.11.11-slim-bookworm

# libgomp1 is the one shared library that Paddle's wheel expects from the system.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /opt/arcface

# Dependencies first, at the exact versions of constraints.txt: this layer is rebuilt only when one of them changes.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; print('\n'.join(p['dependencies'] + e['cpu'] + e['demo'] + e['export']))" > /tmp/requirements.txt \
    && pip install -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY . .
RUN python tools/doctor.py --seconds 0 --no-ranks --disk-mb 16 --data /tmp

# Not root: files written to mounted folders belong to this user (docker run --user $(id -u):$(id -g) for your own).
RUN useradd --create-home --uid 1000 arcface && mkdir -p data work_dirs && chown arcface data work_dirs
USER arcface
CMD ["python", "train.py", "--help"]
