"""Small inputs of kinds that people really have, a folder each."""

import io
import struct
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(kind: str, picture: Image.Image | None = None, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    (picture or Image.fromarray(noise)).save(file, kind, **options)
    return file.getvalue()


def make_cases(root: Path) -> None:
    jpeg = encoded("JPEG")

    def put(path: str, content: bytes | str) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)

    for name in (
        "kaggle_flickr30k/100.jpg", "kaggle_flickr30k/200.jpg", "imagefolder_csv/train/a.jpg",
        "imagefolder_csv/train/b.jpg", "imagefolder_jsonl/train/a.jpg", "imagefolder_jsonl/train/b.jpg",
        "sidecars/a.jpg", "excel_utf16/a.jpg", "latin1/a.jpg", "unquoted_commas/a.jpg", "no_header/a.jpg",
        "absent_images/a.jpg", "chinese/a.jpg", "clutter/0.jpg", "clutter/1.jpg", "clutter/2.jpg",
        f"decomposed_names/{unicodedata.normalize('NFD', 'é.jpg')}", "clutter/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
        "clutter/private/9.jpg", "suffixes/a.jpg", "suffixes/b.jfif", "suffixes/c.jpe", "suffixes/d.JPG", "suffixes/e",
        "links/a.jpg",
    ):  # fmt: skip
        put(name, jpeg)
    put(
        "kaggle_flickr30k/results.csv",
        "image_name| comment_number| comment\n"
        '100.jpg| 0| "Two" tall women , in hats , wait for a bus .\n'
        "100.jpg| 1| Women at a bus stop .\n"
        "200.jpg| 3| A brown dog shakes itself .\n"
        "200.jpg| 4   A wet dog beside a pond .\n",
    )
    put(
        "imagefolder_csv/train/metadata.csv",
        "file_name,caption_0,caption_1\na.jpg,one dog,a dog stands\nb.jpg,two cats,cats sit\n",
    )
    put(
        "imagefolder_jsonl/train/metadata.jsonl",
        '{"file_name": "a.jpg", "text": "one dog"}\n{"file_name": "b.jpg", "text": "two cats"}\n',
    )
    put("sidecars/a.txt", "one dog\na dog stands\n")
    put("sidecars/b.png", encoded("PNG"))
    put("sidecars/b.txt", "two cats\n")
    put("excel_utf16/captions.tsv", "image\tcaption\na.jpg\tun café\n".encode("utf-16"))
    put("latin1/captions.csv", "image,caption\na.jpg,un café\n".encode("latin-1"))
    put("unquoted_commas/captions.csv", "image,caption\na.jpg,a man, a dog, and a cat\n")
    put("no_header/captions.csv", "a.jpg,a dog\n")
    put("absent_images/captions.csv", "image,caption\na.jpg,a dog\nb.jpg,a cat\nc.jpg,a hen\n")
    put("decomposed_names/captions.csv", "image,caption\né.jpg,a dog\n")
    put(
        "chinese/captions.csv",
        "image,caption\na.jpg,一只黑狗在雪地里追一只白狗\na.jpg,两只狗在雪地里玩耍\n",
    )
    resource_fork = bytes([0, 5, 0x16, 7]) + bytes(4092)
    put("clutter/._0.jpg", resource_fork)
    put("clutter/__MACOSX/._1.jpg", resource_fork)
    put("clutter/Thumbs.db", b"\xd0\xcf\x11\xe0")
    put("clutter/private/.nomedia", b"")
    put("suffixes/f.avif", encoded("AVIF"))
    put("suffixes/notes.pdf", b"%PDF-1.7")
    for link, target in (("loop", "."), ("gone.jpg", "nowhere.jpg"), ("b.jpg", "a.jpg")):
        (root / "links" / link).symlink_to(target)
    with tarfile.open(root / "shard.tar", "w") as shard:
        for number in range(3):
            image = jpeg if number < 2 else jpeg[:200]
            members = {"jpg": image, "txt": b"a dog", "json": b'{"caption": "a dog"}'}
            for suffix, content in members.items():
                entry = tarfile.TarInfo(f"{number:09}.{suffix}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    broken = bytearray(encoded("PNG", icc_profile=b"x" * 200))
    place = broken.find(b"iCCP")
    broken[place + 4 + struct.unpack(">I", broken[place - 4 : place])[0]] ^= 0xFF
    put("pictures/png_profile_with_wrong_checksum.png", bytes(broken))
    put("pictures/avif.avif", encoded("AVIF"))
    put("pictures/jpeg_and_more_behind_it.jpg", jpeg + b"more" * 50)
    large = Image.new("RGBA", (8000, 8000))
    put("pictures/webp_of_a_gigabyte.webp", encoded("WEBP", large, lossless=True))
