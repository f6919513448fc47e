"""A run goes on with the listing that it began with, whatever has become of its source; captions are today's."""

import logging
from pathlib import Path

import pytest

from captioner.artifacts.output import WORK, Output
from captioner.config import SourceConfig
from captioner.errors import OutOfReachError, SourceError, StoreError
from captioner.sources import open_source
from captioner.sources.base import Source
from captioner.sources.beginning import keep_beginning, tell_change
from tests.sources import (
    caption_rows,
    captions_of,
    read_all,
    write_images,
    write_parquet,
    write_shard,
)

LISTING = f"{WORK}/listing.parquet"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_images(folder, *(f"{name}.jpg" for name in "abcde"), "f.xyz")
    (folder / "captions.csv").write_text("image,caption\na.jpg,A cat\nb.jpg,A dog\n")
    return folder


def begin(source: Path, output: Path, options: SourceConfig | None = None) -> None:
    with Output(str(output), {"job": "test"}) as claimed:
        keep_beginning(claimed, open_source(str(source), options, output=str(output)))


def go_on(source: Path, output: Path, options: SourceConfig | None = None) -> Source:
    return open_source(str(source), options, output=str(output))


def ids(source: Source) -> list[str]:
    return list(dict.fromkeys(row["image_id"] for row in caption_rows(source)))


def test_pictures_that_come_and_go_change_nothing_and_are_said(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    begin(photos, output)
    before = go_on(photos, output)
    assert caplog.text == ""
    write_images(photos, "new.jpg", "0/older.jpg")
    (photos / "e.jpg").unlink()
    (photos / "d.jpg").write_bytes(b"longer than it was")
    (photos / "g.xyz").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        source = go_on(photos, output)
    assert "3 files are new or changed, 2 files are gone or changed; the run goes on" in caplog.text
    assert ids(source) == [f"{name}.jpg" for name in "abcde"]
    assert (source.num_images(), source.left_out()) == (5, before.left_out())
    assert source.identity() == before.identity()
    # Of a run that has yet to begin, it is what is there today.
    today = ["0/older.jpg", *(f"{name}.jpg" for name in "abcd"), "new.jpg"]
    assert ids(go_on(photos, tmp_path / "other")) == today


def test_captions_and_splits_are_those_of_today(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    begin(photos, output)
    before = go_on(photos, output).identity()
    table = "image,caption,split\na.jpg,A lion,test\nb.jpg,A dog,train\nc.jpg,A frog,train\n"
    (photos / "captions.csv").write_text(table)
    source = go_on(photos, output)
    assert captions_of(source) == {"a.jpg": ["A lion"], "b.jpg": ["A dog"], "c.jpg": ["A frog"]}
    splits = {row["image_id"]: row["split"] for row in caption_rows(source)}
    assert (splits["a.jpg"], splits["b.jpg"]) == ("test", "train")
    now = source.identity()
    assert (now.claim(), now.listing) == (before.claim(), before.listing)
    assert now.captions != before.captions


def test_captions_of_pictures_that_came_later_are_no_mistake(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    begin(photos, output)
    write_images(photos, "new.jpg")
    (photos / "captions.csv").write_text("image,caption\na.jpg,A cat\nnew.jpg,A hen\n")
    assert captions_of(go_on(photos, output)) == {"a.jpg": ["A cat"]}
    assert captions_of(go_on(photos, tmp_path / "other"))["new.jpg"] == ["A hen"]


def test_a_list_of_pictures_may_change_while_its_run_goes_on(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, listed, far = tmp_path / "out", tmp_path / "list.txt", tmp_path / "far"
    write_images(far, "x.jpg")
    lines = ["photos/a.jpg", "photos/b.jpg", str(far / "x.jpg")]
    listed.write_text("\n".join(lines))
    begin(listed, output)
    before = go_on(listed, output)
    (photos / "a.jpg").unlink()
    listed.write_text("\n".join([*lines, "photos/c.jpg"]))
    with caplog.at_level(logging.INFO):
        source = go_on(listed, output)
    assert "1 files are new or changed, 1 files are gone or changed; the run goes on" in caplog.text
    assert ids(source) == lines
    assert source.identity() == before.identity()
    rows = {row["image_id"]: row["error"] for row in read_all(source)}
    assert [rows[line] is None for line in lines] == [False, True, True]
    with pytest.raises(SourceError, match=r"1 of 4 files are not there \(photos/a.jpg\)"):
        go_on(listed, tmp_path / "other")
    # Lists of tables are their tables'.
    write_parquet(tmp_path / "t.parquet", 3)
    listed.write_text("t.parquet\n")
    begin(listed, tmp_path / "tables")
    assert go_on(listed, tmp_path / "tables").num_images() == 3


def test_shards_that_come_change_nothing_and_one_that_changes_is_refused(tmp_path: Path) -> None:
    folder, output = tmp_path / "shards", tmp_path / "out"
    write_shard(folder / "b.tar", {"1.jpg": b"1", "1.txt": b"One"})
    begin(folder, output)
    write_shard(folder / "a.tar", {"2.jpg": b"2"})
    assert ids(go_on(folder, output)) == ["b/1"]
    assert ids(go_on(folder, tmp_path / "other")) == ["a/2", "b/1"]
    write_shard(folder / "b.tar", {f"{number}.jpg": bytes(9000) for number in range(9)})
    with pytest.raises(SourceError, match=r"b.tar is gone or another since the run began"):
        go_on(folder, output)


def test_a_limit_chooses_once(photos: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", SourceConfig(limit=2, split="train")
    begin(photos, output, options)
    write_images(photos, "0.jpg")
    source = go_on(photos, output, options)
    assert ids(source) == ["a.jpg", "b.jpg"]
    assert source.left_out()["over the limit"] == 3


def test_ids_of_a_column_are_those_that_the_run_began_with(photos: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", SourceConfig(id_column="key")
    rows = "".join(f"{name}.jpg,{name.upper()},Something\n" for name in "abcde")
    (photos / "captions.csv").write_text(f"image,key,caption\n{rows}")
    begin(photos, output, options)
    (photos / "captions.csv").write_text(f"image,key,caption\n{rows.replace('A', 'X')}")
    assert ids(go_on(photos, output, options)) == list("ABCDE")


def test_shards_that_come_are_ignored_and_those_that_change_refused(tmp_path: Path) -> None:
    shards, output = tmp_path / "shards", tmp_path / "out"
    write_parquet(shards / "b.parquet", 30)
    begin(shards, output)
    write_parquet(shards / "a.parquet", 20)
    source = go_on(shards, output)
    assert source.num_images() == 30
    assert all("b.parquet" in text for texts in captions_of(source).values() for text in texts)
    for change in (lambda: write_parquet(shards / "b.parquet", 31), (shards / "b.parquet").unlink):
        change()
        with pytest.raises(SourceError, match=r"b\.parquet is gone or another since the run began"):
            go_on(shards, output)


def test_what_another_source_began_with_is_none_of_ours(photos: Path, tmp_path: Path) -> None:
    begin(photos, tmp_path / "out")
    write_images(tmp_path / "others", "x.jpg")
    assert ids(go_on(tmp_path / "others", tmp_path / "out")) == ["x.jpg"]


def test_a_damaged_listing_is_refused_in_one_line(photos: Path, tmp_path: Path) -> None:
    begin(photos, tmp_path / "out")
    (tmp_path / "out" / LISTING).write_bytes(b"PAR1 and nothing")
    with pytest.raises(StoreError, match=r"listing\.parquet is damaged: --restart begins") as one:
        go_on(photos, tmp_path / "out")
    assert "\n" not in str(one.value)


def test_what_has_changed_since_publishing_is_said_with_the_way_out(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_source(str(photos)).identity()
    tell_change(first, open_source(str(photos)).identity(), "out")
    assert caplog.text == ""
    (photos / "captions.csv").write_text("image,caption\na.jpg,A lion\nb.jpg,A dog\n")
    tell_change(first, open_source(str(photos)).identity(), "out")
    assert "captions or splits have changed since out was published" in caplog.text
    caplog.clear()
    write_images(photos, "new.jpg")
    tell_change(first, open_source(str(photos)).identity(), "out")
    assert "the images have changed since out was published" in caplog.text
    assert "--extends" in caplog.text


def test_who_waited_while_another_run_began_starts_again_with_its_files(
    photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    waiting = go_on(photos, output)
    begin(photos, output)
    write_images(photos, "new.jpg")
    late = open_source(str(photos))
    with Output(str(output), {"job": "test"}) as claimed:
        keep_beginning(claimed, waiting)
        with pytest.raises(OutOfReachError, match="another run began here with other files"):
            keep_beginning(claimed, late)
        keep_beginning(claimed, go_on(photos, output))
