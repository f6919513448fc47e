"""Loss, gradients over workers, clipping, optimizers and schedules, on the real merge decoder."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from captioner.artifacts.model_directory import pack_weights
from captioner.config import DecodeConfig, DecoderConfig, OptimizerConfig, TrainConfig
from captioner.decoders import build_decoder
from captioner.decoders.ensemble import Ensemble
from captioner.decoding.beam import search
from captioner.decoding.cider import NGramFrequencies, cider_d
from captioner.encoders.spec import FeatureShape
from captioner.errors import ConfigError, TrainingError
from captioner.text import END, PAD, START
from captioner.training import steps
from captioner.training.data import Batch, CaptionData, Done
from captioner.training.history import EpochRecord, finished
from captioner.training.plan import Plan, caption_units
from captioner.training.resident import Resident
from captioner.training.state import EpochSoFar, TrainingState, after_steps
from captioner.training.steps import (
    Schedule,
    TeacherForcing,
    build_optimizer,
    check_compute,
    require_finite,
    teacher_forcing,
    train_step,
)
from captioner.training.validation import GreedyCider

WORDS = 20
CHANNELS = 3
SHAPE = FeatureShape(CHANNELS, CHANNELS, 2, 2)


def decoder(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return build_decoder(DecoderConfig(width=8, output_width=8, dropout=dropout), WORDS, SHAPE)


class Fixture(Resident):
    """Captions in memory, asked for batches of any plan and worker."""

    def __init__(self, tokens: list[list[int]], image_rows: np.ndarray, pooled: np.ndarray):
        settings = TrainConfig(features="unused", output="unused", global_batch=8)
        super().__init__(
            CaptionData(tokens, image_rows), [{"pooled": torch.from_numpy(pooled)}], settings, 0, 1
        )

    def whole(self) -> Batch:
        """All captions in one batch."""
        return next(iter(replace(self.epoch(0), plan=[[np.arange(len(self.data))[:, None]]])))

    def worker(self, rank: int, workers: int) -> "Fixture":
        other = copy.copy(self)
        other.rank, other.workers = rank, workers
        return other


def captions(count: int) -> Fixture:
    generator = np.random.default_rng(1)
    tokens = [
        [START, *generator.integers(4, WORDS, generator.integers(1, 9)).tolist(), END]
        for _ in range(count)
    ]
    pooled = generator.normal(size=(4, CHANNELS)).astype(np.float32)
    return Fixture(tokens, np.arange(count) % 4, pooled)


def config(**optimizer: object) -> TrainConfig:
    settings = OptimizerConfig.model_validate({"clip_norm": None} | optimizer)
    return TrainConfig(features="unused", output="unused", optimizer=settings)


def change(model: nn.Module, data: Fixture, rank: int, workers: int, step: int) -> Tensor:
    """Minus the gradient of one worker's step, as one vector: what SGD of rate 1 adds to the weights."""
    replica = TeacherForcing(copy.deepcopy(model)).train()
    mine = data.worker(rank, workers)
    batch = list(mine.epoch(0))[step]
    train_step(
        replica,
        torch.optim.SGD(replica.parameters(), lr=1.0),
        batch,
        seed=(0, 0, step, rank),
        workers=workers,
        config=config(),
        compute="float32",
    )
    after = nn.utils.parameters_to_vector(replica.decoder.parameters())
    return (after - nn.utils.parameters_to_vector(model.parameters())).detach()


def test_loss_is_the_sum_over_real_next_words() -> None:
    model = decoder().eval()
    batch = captions(6).whole()
    loss, correct = TeacherForcing(model).eval()(batch.features, batch.tokens)
    logits = model(batch.features, batch.tokens[:, :-1])
    expected = functional.cross_entropy(
        logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), ignore_index=PAD, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    hits = (logits.argmax(-1) == batch.tokens[:, 1:]) & (batch.tokens[:, 1:] != PAD)
    assert int(correct) == int(hits.sum())
    assert batch.global_targets == int((batch.tokens[:, 1:] != PAD).sum())


def test_more_padding_changes_nothing() -> None:
    forcing = TeacherForcing(decoder()).eval()
    batch = captions(6).whole()
    wider = functional.pad(batch.tokens, (0, 5), value=PAD)
    torch.testing.assert_close(
        forcing(batch.features, wider), forcing(batch.features, batch.tokens)
    )


def test_batched_scoring_agrees_with_the_training_loss() -> None:
    data = captions(6)
    batch = data.whole()
    model = decoder()
    with torch.no_grad():
        loss, correct = TeacherForcing(model).eval()(batch.features, batch.tokens)
    lists = [[int(token) for token in row if token != PAD] for row in batch.tokens]
    rows = torch.from_numpy(data.data.image_rows)
    got = teacher_forcing(model, data.views[0], rows, lists)
    assert got[0] == pytest.approx(float(loss), rel=1e-5)
    assert got[1:] == (int(correct), batch.global_targets)


def test_label_smoothing_is_for_training_alone() -> None:
    batch = captions(6).whole()
    plain, smooth = TeacherForcing(decoder(), 0.0), TeacherForcing(decoder(), 0.3)
    assert (
        smooth.train()(batch.features, batch.tokens)[0]
        != plain.train()(batch.features, batch.tokens)[0]
    )
    torch.testing.assert_close(
        smooth.eval()(batch.features, batch.tokens), plain.eval()(batch.features, batch.tokens)
    )


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_mean_gradient_of_workers_is_one_workers_gradient(workers: int) -> None:
    # 17 captions in batches of 8: a batch of one leaves all but one worker without a caption.
    data, model = captions(17), decoder()
    plan: Plan = data.epoch(0).plan
    assert sorted(len(share) for (share,) in plan) == [1, 8, 8]
    for step, (share,) in enumerate(plan):
        alone = change(model, data, 0, 1, step)
        parts = [change(model, data, rank, workers, step) for rank in range(workers)]
        idle = [part for part in parts if not part.any()]
        assert len(idle) == max(0, workers - len(share))
        assert alone.norm() > 1e-3
        torch.testing.assert_close(torch.stack(parts).mean(dim=0), alone, rtol=1e-4, atol=1e-6)


def test_gradient_of_uneven_groups_is_that_of_their_captions_alone() -> None:
    """Images with 7, 2, 1 and 3 captions: units of up to four, of which the first image makes two."""
    data, model = captions(13), decoder()
    data.data.image_rows = np.repeat(np.arange(4), (7, 2, 1, 3))
    units = caption_units(data.data.image_rows, grouped=True)
    assert units.shape == (5, 4)

    def gradient(units: np.ndarray) -> Tensor:
        replica = TeacherForcing(copy.deepcopy(model)).train()
        batch = next(iter(replace(data.epoch(0), plan=[[units]])))
        optimizer = torch.optim.SGD(replica.parameters(), lr=1.0)
        train_step(
            replica, optimizer, batch, seed=(0,), workers=1, config=config(), compute="float32"
        )
        return nn.utils.parameters_to_vector(p.grad for p in replica.parameters() if p.grad is not None)  # fmt: skip

    alone = gradient(np.arange(13)[:, None])
    assert alone.norm() > 1e-3
    torch.testing.assert_close(gradient(units), alone, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    batch = captions(8).whole()
    norms = {}
    for clip in (None, 0.01):
        forcing = TeacherForcing(decoder()).train()
        before = nn.utils.parameters_to_vector(forcing.parameters()).detach().clone()
        train_step(
            forcing,
            torch.optim.SGD(forcing.parameters(), lr=1.0),
            batch,
            seed=(0,),
            workers=1,
            config=config(clip_norm=clip),
            compute="float32",
        )
        after = nn.utils.parameters_to_vector(forcing.parameters()).detach()
        norms[clip] = float((after - before).norm())
    assert norms[None] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
def test_eight_captions_can_be_learnt_by_heart(name: str, compute: str) -> None:
    generator = np.random.default_rng(2)
    tokens = [[START, *generator.integers(4, WORDS, 5).tolist(), END] for _ in range(8)]
    data = Fixture(tokens, np.arange(8), np.eye(8, 9, dtype=np.float32))
    torch.manual_seed(0)
    model = build_decoder(
        DecoderConfig(width=32, output_width=32, dropout=0.0), WORDS, FeatureShape(9, 9, 2, 2)
    )
    forcing, settings = TeacherForcing(model).train(), config(name=name, learning_rate=0.02)
    optimizer = build_optimizer(settings.optimizer, model)
    batch = data.whole()
    for _ in range(80):
        train_step(
            forcing,
            optimizer,
            batch,
            seed=(0,),
            workers=1,
            config=settings,
            compute=compute,
        )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad():
        loss, correct = forcing.eval()(batch.features, batch.tokens)
    assert int(correct) == batch.global_targets
    assert float(loss) / batch.global_targets < 0.2


def test_adamw_decays_weights_apart_from_the_gradient() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.weight)
    settings = OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.5)
    model.weight.grad = torch.zeros_like(model.weight)
    build_optimizer(settings, model).step()
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), 0.95))


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adamw"])
def test_decay_of_an_ensemble_is_that_of_each_of_its_decoders_alone(name: str) -> None:
    data = captions(12)
    settings = config(name=name, learning_rate=0.01, weight_decay=0.3)
    together = Ensemble([decoder(1), decoder(2)])  # type: ignore[list-item]
    apart = [decoder(1), decoder(2)]

    def learn(network: nn.Module) -> Tensor:
        model = TeacherForcing(network).train()  # type: ignore[arg-type]
        optimizer = build_optimizer(settings.optimizer, network)
        for step in range(5):
            train_step(
                model, optimizer, data.whole(), seed=(step,), workers=1, config=settings, compute="float32"
            )  # fmt: skip
        return nn.utils.parameters_to_vector(network.parameters()).detach()

    wanted = torch.cat([learn(one) for one in apart])
    torch.testing.assert_close(learn(together), wanted, rtol=1e-2, atol=5e-3)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    schedule = Schedule(
        OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="constant"), 100
    )
    assert [schedule.rate(step) for step in (0, 1, 2, 3, 4, 99)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_peak_to_zero() -> None:
    schedule = Schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine"), 110)
    assert schedule.rate(10) == 2.0
    assert schedule.rate(60) == pytest.approx(1.0)
    assert schedule.rate(110) == pytest.approx(0.0, abs=1e-12)
    rates = [schedule.rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_plateau_acts_after_its_patience_and_starts_counting_anew() -> None:
    settings = OptimizerConfig(
        learning_rate=1.0, schedule="plateau", plateau_patience=2, plateau_factor=0.1, minimum=0.05
    )
    schedule, rates = Schedule(settings, 100), []
    for improved in (True, False, True, False, False, False, False):
        schedule.after_epoch(improved)
        rates.append(schedule.rate(50))
    assert rates == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.05])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_epoch(loss: float) -> None:
    require_finite(3.0, 0, "training")
    with pytest.raises(TrainingError, match="training loss is .* in epoch 3"):
        require_finite(loss, 2, "training")


def run_steps(state: TrainingState, data: Fixture, steps: range) -> None:
    """Steps of one epoch, as the training loop takes them."""
    model = TeacherForcing(state.network).train()
    batches = list(data.epoch(3))
    for step in steps:
        state.before_step(3 + step / len(batches))
        train_step(
            model,
            state.optimizer,
            batches[step],
            seed=(0, 3, step, 0),
            workers=1,
            config=config(),
            compute="float32",
        )
        state.after_step()


@pytest.mark.parametrize("first", [1, 4])
def test_a_run_may_continue_from_any_step(tmp_path: Path, first: int) -> None:
    data = captions(45)
    settings = config(learning_rate=0.01, warmup_steps=4, schedule="cosine").model_copy(
        update={"ema_decay": 0.9}
    )
    unbroken, stopped, resumed = (
        TrainingState(decoder(seed, dropout=0.5), settings, steps_per_epoch=6) for seed in (0, 0, 1)
    )
    run_steps(unbroken, data, range(6))
    run_steps(stopped, data, range(first))
    record = EpochRecord(
        epoch=1, train_loss=1.0, train_accuracy=0.0, validation_loss=1.0, validation_accuracy=0.0,
        learning_rate=0.01, seconds=1.0, captions_per_second=1.0, data_wait_fraction=0.0,
    )  # fmt: skip
    assert stopped.after_epoch(record)
    stopped.save(tmp_path)
    torch.rand(7)  # what was drawn before does not matter
    resumed.restore(tmp_path)
    assert resumed.history == [record]
    assert resumed.best == pack_weights(stopped.judged)
    run_steps(resumed, data, range(first, 6))
    assert pack_weights(resumed.network) == pack_weights(unbroken.network)
    assert pack_weights(resumed.judged) == pack_weights(unbroken.judged)
    states = [one.optimizer.state_dict() for one in (resumed, unbroken)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_checkpoint_within_an_epoch_holds_what_is_over_of_it(tmp_path: Path) -> None:
    state, restored = (TrainingState(decoder(), config(), steps_per_epoch=6) for _ in range(2))
    done = after_steps(after_steps([], 3, 2), 4, 2)
    assert done == [Done(7, 2)]
    done = after_steps(done, 1, 3)
    assert done == [Done(7, 2), Done(1, 3)]
    state.epoch = EpochSoFar(done, [[1.5, 2.0], [0.25, 1.0], [3.0, 0.0]], 7.0, 0.5)
    state.save(tmp_path)
    restored.restore(tmp_path)
    assert restored.epoch == state.epoch
    assert (restored.history, restored.best, restored.epoch.steps) == ([], None, 8)
    # The same workers go on with their own, of others the first has all.
    assert [restored.epoch.sums_of(rank, 3).tolist() for rank in range(3)] == state.epoch.sums
    assert [restored.epoch.sums_of(rank, 2).tolist() for rank in range(2)] == [[4.75, 3.0], [0, 0]]


@pytest.mark.parametrize("parts", [2, 3, 100])
@pytest.mark.parametrize("grouped", [False, True])
def test_accumulated_gradient_is_that_of_one_pass(parts: int, grouped: bool) -> None:
    data, model = captions(14), decoder()
    units = caption_units(data.data.image_rows, grouped=grouped)
    batch = next(iter(replace(data.epoch(0), plan=[[units]])))
    assert sum(len(part.captions) for part in batch.split(parts)) == len(units)
    assert len(batch.split(parts)) <= parts

    def step(accumulation: int) -> tuple[Tensor, list[float]]:
        replica = TeacherForcing(copy.deepcopy(model)).train()
        sums = train_step(
            replica,
            torch.optim.SGD(replica.parameters(), lr=1.0),
            batch,
            seed=(0,),
            workers=1,
            config=config().model_copy(update={"gradient_accumulation": accumulation}),
            compute="float32",
        )
        after = nn.utils.parameters_to_vector(replica.parameters()).detach()
        return after, [float(one) for one in sums]

    (once, sums), (accumulated, others) = step(1), step(parts)
    torch.testing.assert_close(accumulated, once, rtol=1e-5, atol=1e-6)
    assert others == pytest.approx(sums, rel=1e-5)


def test_averaging_changes_what_is_judged_and_nothing_of_the_training() -> None:
    data = captions(45)
    without, barely, half = (
        TrainingState(
            decoder(dropout=0.5),
            config(learning_rate=0.02).model_copy(update={"ema_decay": decay}),
            steps_per_epoch=6,
        )
        for decay in (0.0, 1e-7, 0.5)
    )
    for state in (without, barely, half):
        run_steps(state, data, range(6))
        assert pack_weights(state.network) == pack_weights(without.network)
    expected, close, far = (
        nn.utils.parameters_to_vector(state.judged.parameters())
        for state in (without, barely, half)
    )
    torch.testing.assert_close(close, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(far, expected, rtol=1e-2, atol=1e-3)


def test_every_step_and_worker_has_its_own_dropout() -> None:
    losses = []
    batch = captions(8).whole()
    for seed in (
        (0, 0, 0, 0),
        (0, 0, 0, 0),
        (0, 0, 0, 1),
        (0, 0, 1, 0),
        (0, 1, 0, 0),
        (1, 0, 0, 0),
    ):
        model = TeacherForcing(decoder(dropout=0.5)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss, _ = train_step(
            model, optimizer, batch, seed=seed, workers=1, config=config(), compute="float32"
        )
        losses.append(float(loss))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 5


def test_greedy_cider_is_that_of_the_decoders_own_captions() -> None:
    data = captions(12)
    judge = GreedyCider(data.data, max_length=6)
    model = decoder().eval()
    (batch,) = data.ordered(images=4)
    references = [
        [caption[1:] for number, caption in enumerate(map(data.data.caption, range(12))) if number % 4 == image]
        for image in range(4)
    ]  # fmt: skip
    counts = NGramFrequencies.count(references)
    found = search(model, data.views[0], DecodeConfig(beam_size=1, max_length=6))  # fmt: skip
    expected = sum(
        cider_d(counts.vector([*one[0].tokens, END]), [counts.vector(caption) for caption in captions])
        for one, captions in zip(found, references, strict=True)
    )  # fmt: skip
    assert judge.sums(model, batch).tolist() == pytest.approx([expected, 4])
    # Workers share the images; one without any adds nothing.
    parts = []
    for rank in range(5):
        mine = data.worker(rank, 5)
        (share,) = mine.ordered(images=4)
        parts.append(judge.sums(model, share))
    assert parts[4].tolist() == [0.0, 0.0]
    assert torch.stack(parts).sum(dim=0).tolist() == pytest.approx([expected, 4])


def test_training_is_over_after_its_epochs_or_its_patience() -> None:
    def history(*losses: float) -> list[EpochRecord]:
        return [
            EpochRecord(
                epoch=number, train_loss=1.0, train_accuracy=0.0, validation_loss=loss, validation_accuracy=0.0,
                learning_rate=0.01, seconds=1.0, captions_per_second=1.0, data_wait_fraction=0.0,
            )
            for number, loss in enumerate(losses, 1)
        ]  # fmt: skip

    settings = config().model_copy(update={"epochs": 5, "patience": 2})
    over = [finished(history(*losses), settings) for losses in (
        (), (3.0,), (3.0, 2.0, 2.5), (3.0, 2.0, 2.5, 2.1), (5.0, 4.0, 3.0, 2.0), (5.0, 4.0, 3.0, 2.0, 1.0),
    )]  # fmt: skip
    assert over == [False, False, False, True, False, True]
    patient = settings.model_copy(update={"patience": None})
    assert not finished(history(1.0, 2.0, 3.0, 4.0), patient)


def test_bfloat16_is_refused_where_there_is_no_lstm_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "has_avx512", lambda: False)
    check_compute(torch.device("cpu"), "float32")
    check_compute(torch.device("cuda"), "bfloat16")
    with pytest.raises(ConfigError, match="compute: bfloat16 wants AVX512"):
        check_compute(torch.device("cpu"), "bfloat16")
