"""Serve models over HTTP: an API and a web page.

python -m ray_jobs.serve --model runs/flickr8k/model --port 8000
"""

from captioner.config import ServeConfig
from captioner.runtime import command_line
from captioner.serving.run import serve_models


def main() -> None:
    command_line.run(serve_models, ServeConfig)


if __name__ == "__main__":
    main()
