"""The service with a model whose forward sleeps: ``SLOW_SECONDS=.25 python -m tests.serve.slow --model slow=...``."""

import os
import time

from captioner.captioning.captioner import Caption
from captioner.config import ServeConfig
from captioner.runtime.command_line import run
from captioner.serving.queue import Ran
from captioner.serving.replica import CaptionModel, _Item
from captioner.serving.run import serve_models


class SlowModel(CaptionModel):
    """Takes ``SLOW_SECONDS`` more for each picture, where it is called ``slow``."""

    def _run(self, items: list[_Item]) -> Ran[Caption]:
        seconds = len(items) * float(os.environ["SLOW_SECONDS"]) * (self._name == "slow")
        time.sleep(seconds)
        ran = super()._run(items)
        return ran._replace(encoder_s=ran.encoder_s + seconds)

    def _warm_up(self, max_batch_size: int) -> None:
        super()._warm_up(1)  # quick to start


if __name__ == "__main__":
    run(lambda config: serve_models(config, SlowModel), ServeConfig)
