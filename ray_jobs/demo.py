"""Everything end to end on generated pictures: extract, train, evaluate, caption; no network, two minutes.

python -m ray_jobs.demo --output runs/demo
"""

import time

import pyarrow.parquet as pq

from captioner import storage
from captioner.captioning.collection import caption_collection
from captioner.config import (
    CaptionConfig,
    DemoConfig,
    EvaluateConfig,
    ExtractConfig,
    ShapesConfig,
    SourceConfig,
)
from captioner.evaluation.evaluate import evaluate, score_table
from captioner.evaluation.scenes import write_truth
from captioner.features.extract import extract
from captioner.presets import demo as demo_training
from captioner.runtime import command_line, following
from captioner.runtime.screen import SCREEN
from captioner.training.run import run_training


def demo(config: DemoConfig) -> str:
    started = time.monotonic()
    root = storage.absolute(config.output)
    features, model, report = (f"{root}/{part}" for part in ("features", "model", "report"))
    extract(
        ExtractConfig(
            source="shapes",
            output=features,
            encoder=config.encoder,
            grid=True,
            source_options=SourceConfig(shapes=config.shapes),
            restart=config.restart,
        )
    )
    changes = {"features": features, "output": model, "epochs": config.epochs}
    run_training(demo_training().model_copy(update=changes | {"restart": config.restart}))
    result = evaluate(
        EvaluateConfig(
            features=features,
            model=model,
            output=report,
            split="test",
            decode=config.decode,
            meteor=False,  # a quarter of a minute and 2 GiB for Java
            restart=config.restart,
        )
    )
    unseen = ShapesConfig(train=1, validation=1, test=30, seed=config.shapes.seed + 1)
    manifest = caption_collection(
        CaptionConfig(
            images="shapes",
            source_options=SourceConfig(shapes=unseen),
            model=model,
            output=f"{root}/captions",
            restart=config.restart,
        )
    )
    SCREEN.show(f"\n{score_table(result)}\n\n{write_truth(root)}\n\nNew pictures:")
    table = pq.read_table(storage.join(root, "captions", manifest.files[0].path)).slice(0, 8)
    for row in table.to_pylist():
        SCREEN.show(f"  {row['image_id']:18} {row['caption']}")
    seconds = time.monotonic() - started
    SCREEN.show(f"\npicture: {report}/grid.png\nmodel:   {model}\n{seconds:.0f} s")
    return following.serve(storage.join(config.output, "model"))


def main() -> None:
    command_line.run(demo, DemoConfig)


if __name__ == "__main__":
    main()
