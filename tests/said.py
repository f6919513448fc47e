"""All that a job may say: a pattern of its whole output."""

import re
import shlex

LOG = r"/\S+/captioner-\d+\.log"
START = rf"Ray: \d+ CPUs, \d+ GPUs; its log: {LOG}"
NUMBER = r"-?[\d.,e+-]+"

# Of each job its lines, in order: a pattern that may repeat ends in '*'. {root} is where its output lies.
LINES = {
    "extract_features": [
        START,
        r"extracting \d+ images with \S+ \(\S+\), \d+ CPU encoders? of \d+ threads",
        r"\d+ of \d+ images( \| .+)?*",
        "{root}/features: published after \\d+ s",
        r"  (train|validation|test) +\d+ images +\d+ captions*",
        r"  \d+ found: \d+ fine, \d+ rejected",
        "next: captioner train --features {features} --output {free}",
    ],
    "train": [
        START,
        r"training merge on \d+ captions, \d+ words, \d workers?",
        r"epoch \d+/\d+ \| (train loss|\d+ of \d+ steps) .+*",
        "{root}/model: published after \\d+ s",
        rf"{{root}}/model: best epoch \d+ of \d+, validation loss {NUMBER}, accuracy {NUMBER}",
        "next: captioner evaluate --features {features} --model {model} --output {free}",
    ],
    "evaluate": [
        START,
        r"captioning \d+ images of split validation",
        r"\d+ of \d+ images( \| .+)?*",
        "(METEOR and Stanford's tokenizer need Java.*)?",
        "{root}/report: published after \\d+ s",
        r"\d+ images, split validation",
        r"beam_size \d+, .+",
        r" +standard +notebook",
        rf"\w+ +{NUMBER}( +{NUMBER})?*",
        r"next word, teacher forcing:",
        rf"\w+ +{NUMBER}*",
        r" +captions +references",
        rf"[\w ]+ {NUMBER} +{NUMBER}*",
        "report: {root}/report",
        "next: captioner serve --model {model}",
    ],
    "caption": [
        START,
        r"captioning \d+ images with {root}/model",
        r"\d+ of \d+ images( \| .+)?*",
        r"  1 rejected: not a JPEG, .+ image \(deep/notes.jpg\)",
        r"6 found: 5 fine, 1 rejected",
        "{root}/captions: published after \\d+ s",
        "next: captioner serve --model {model}",
    ],
    "tune": [
        START,
        r"6 trials, 1 at a time",
        r"(trial-\d+ \| epoch \d+/\d+ \| validation loss [\d.]+|\d of 6 trials over, \d running)*",
    ],
    "serve": [
        START,
        r"serving .+ at http://127.0.0.1:\d+",
        r"next: open http://127.0.0.1:\d+/ in a browser; Ctrl-C ends the service",
        "answering what is under way",
    ],
}


def by_submission(text: str) -> str:
    """Of what ``ray job submit`` has shown, the job's own part."""
    (shown,) = re.findall(
        r"^Running entrypoint for job .+\n((?:.*\n)*?)(?:.*SUCC cli.py.*)?-{9,}", text, re.MULTILINE
    )
    return str(shown)


def unexpected(job: str, text: str, root: str = "") -> list[str]:
    """Lines of a job's output that are none of those it may say, and those that it should have said."""
    names = {"features": "features", "model": "model"}
    quoted = {name: re.escape(shlex.quote(f"{root}/{place}")) for name, place in names.items()}
    wanted = [
        line.replace("{root}", re.escape(root))
        .replace("{free}", r".+")
        .replace("{features}", f"({quoted['features']}|file://\\S+)")
        .replace("{model}", quoted["model"])
        for line in LINES[job]
    ]
    lines = [line for line in text.splitlines() if line.strip()]
    is_interrupted = lines[-1:] == ["interrupted; the same command goes on from here"]
    del lines[len(lines) - is_interrupted :]
    at = 0
    for pattern in wanted:
        if at == len(lines) and is_interrupted:
            break
        if pattern.endswith("*"):
            while at < len(lines) and re.fullmatch(pattern[:-1], lines[at]):
                at += 1
        elif at < len(lines) and re.fullmatch(pattern, lines[at]):
            at += 1
        elif not re.fullmatch(pattern, ""):
            return [f"instead of {pattern!r}:", *lines[at:]]
    return lines[at:]
