"""Check a published directory: every file that its manifest lists, its size, digest, rows and checksums.

captioner verify runs/flickr8k/features
"""

from captioner.artifacts.verify import verify
from captioner.config import VerifyConfig
from captioner.runtime import command_line, following
from captioner.runtime.screen import SCREEN


def check(config: VerifyConfig) -> str | None:
    found = verify(config.uri)
    SCREEN.show("\n".join([*found.problems, found.summary]))
    if found.problems:
        raise SystemExit(1)
    return following.after(config.uri, found.manifest)


def main() -> None:
    command_line.run(check, VerifyConfig)


if __name__ == "__main__":
    main()
