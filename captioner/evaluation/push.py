"""A model directory on the Hugging Face hub, with a model card."""

import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
)

from captioner import storage
from captioner.artifacts.manifests import MANIFEST, ReportManifest, open_manifest
from captioner.artifacts.model_directory import ModelDirectory, open_model
from captioner.config import FinetuneConfig, LearningConfig, PushConfig, TrainConfig
from captioner.errors import ModelError, OutOfReachError
from captioner.evaluation.evaluate import SCORES, Report
from captioner.runtime.flags import spell

CARD = "README.md"
PASSING = (408, 429, *range(500, 600))


def push(config: PushConfig) -> str:
    """Publish a model on the hub: every file of its manifest, checked, and a model card, in one commit. Files that
    an interrupted run has brought there are not sent again; the commit is the last thing that happens.

    Returns:
        its URI: ``hf:org/name``.

    Raises:
        ModelError: the model is unusable, a report is another model's, or the hub refuses.
        OutOfReachError: the hub cannot be reached.
    """
    model = open_model(config.model)
    reports = [_open_report(uri, model) for uri in config.report]
    api = HfApi()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for entry in model.manifest.files:
                _put(Path(folder, entry.path), model.read(entry.path))
            _put(Path(folder, MANIFEST), storage.read_bytes(storage.join(model.root, MANIFEST)))
            _put(Path(folder, CARD), model_card(model, reports, config).encode())
            api.create_repo(config.repo, private=config.private, exist_ok=True)
            api.upload_folder(
                repo_id=config.repo,
                folder_path=folder,
                commit_message=f"Model {model.version[:12]}",
            )
    except (ValueError, LocalTokenNotFoundError) as error:  # a name that cannot be, an odd answer
        raise ModelError(f"{config.repo}: {_one_line(error)}") from error
    except HfHubHTTPError as error:
        passing = error.response is None or error.response.status_code in (
            408,
            429,
            *range(500, 600),
        )
        raise (OutOfReachError if passing else ModelError)(
            f"{config.repo}: {_one_line(error)}"
        ) from error
    except HTTPError as error:
        raise OutOfReachError(f"{config.repo}: {_one_line(error)}") from error
    return f"hf:{config.repo}"


def model_card(model: ModelDirectory, reports: list[Report], config: PushConfig) -> str:
    """Markdown with the hub's metadata: what the model is, its scores, how it was made, what may be done with it."""
    record, encoder = model.record, model.record.encoder
    name = config.repo.rpartition("/")[2]
    results = [
        EvalResult(
            task_type="image-to-text",
            dataset_type=config.dataset or "unknown",
            dataset_name=config.dataset or "unknown",
            dataset_split=report.scores["split"],
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for report in reports
        for metric, value in report.scores["standard"].items()
        if isinstance(value, float)
    ]
    data = ModelCardData(
        license=config.license,
        library_name="captioner",
        pipeline_tag="image-to-text",
        tags=["image-captioning", record.decoder.kind],
        datasets=config.dataset,
        model_name=name,
        eval_results=results or None,
    )
    scores = [
        "| split | images | search | " + " | ".join(metrics) + " |\n"
        f"|{'---|' * (3 + len(metrics))}\n"
        f"| {report.scores['split']} | {report.scores['images']} | {_search(report.scores['decode'])} | "
        + " | ".join(f"{value:.3f}" for value in metrics.values())
        + " |"
        for report in reports
        for metrics in [
            {k: v for k, v in report.scores["standard"].items() if isinstance(v, float)}
        ]
    ]
    curves = any(entry.path == "curves.png" for entry in model.manifest.files)
    spec = encoder.spec
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"Captions pictures: a `{record.decoder.kind}` decoder ({record.parameters:,} parameters, a vocabulary of "
        f"{record.vocabulary_size:,}) on features of `{spec.name}` (layer `{spec.layer}`, weights "
        f"`{encoder.weights}`), which are part of the model. It holds no code.",
        f"```\ncaptioner caption --model hf:{config.repo} --images photographs/ --output captions\n"
        f"captioner serve --model hf:{config.repo}\n```",
        "## Scores",
        "\n\n".join(scores) or "None were published with it.",
        "## How it was made",
        f"```\n{_command(record.training)}\n```",
        *(["![Loss and accuracy by epoch](curves.png)"] if curves else []),
        "## Data and licence",
        f"Trained on {config.dataset or 'captions that are not named here'}. Licence of the weights: "
        f"{config.license}; the terms of the data and of the encoder's weights hold beside it.",
    ]
    return "\n\n".join(parts) + "\n"


def _command(training: dict[str, Any]) -> str:
    """The training's command line: what differs from the defaults, but for places on the machine that trained."""
    config: LearningConfig = TrainConfig(features="", output="")
    begun = "train --features FEATURES"
    if "stages" in training:
        config = FinetuneConfig(model="", source="", output="")
        begun = "finetune --model TRAINED --source PICTURES"
    defaults = config.model_dump(mode="json")
    places = ("features", "output", "model", "source")
    flags = [
        f"{spell(place)} {value}"
        for place, value in _leaves(training)
        if place[0] not in places and value != _at(defaults, place)
    ]
    return " ".join([f"captioner {begun} --output MODEL", *flags])


def _leaves(
    value: dict[str, Any], place: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, inner in value.items():
        here = (*place, name)
        found += _leaves(inner, here) if isinstance(inner, dict) else [(here, inner)]
    return found


def _at(values: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _search(decode: dict[str, Any]) -> str:
    ranked = f", MBR over {decode['mbr_samples']} samples" if decode["mbr_samples"] else ""
    return f"beam {decode['beam_size']}{ranked}"


def _open_report(uri: str, model: ModelDirectory) -> Report:
    root = storage.absolute(uri)
    open_manifest(root, ReportManifest)
    identity = storage.read_json(storage.join(root, "_job.json"))
    if identity.get("model") != model.version:
        raise ModelError(f"{uri} is the report of another model than {model.uri}")
    return Report(root, storage.read_json(storage.join(root, SCORES)))


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _one_line(error: Exception) -> str:
    # Links to the hub's request log are of no use to who asks.
    text = re.sub(r"\(Request ID:[^)]*\)", "", str(error))
    return " ".join(text.split())
