#!/usr/bin/env python3
"""Cut the nuclei dataset's validation images into tiles, a folder in COCO's format.

    DETECTRON2_DATASETS=data python benchmarks/nuclei_tiles.py output/nuclei_tiles

A mask-classification model that was trained on crops for minutes finds almost nothing in whole
images, because its queries have learnt the positions and numbers of nuclei in crops. Tiles of the
crops' size measure what it has learnt. At most four tiles are cut from the centre of each image; an
instance with less than 10 pixels in a tile is a crowd there and is ignored.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

LEAST = 10


def corners(length: int, side: int) -> list[int]:
    """The start positions of tiles along one axis of an image: two in the centre, or one."""
    if length < 2 * side:
        return [max(length - side, 0) // 2]
    first = length // 2 - side
    return [first, first + side]


def cut_annotation(rle: dict[str, Any], top: int, left: int, side: int) -> dict[str, Any] | None:
    """The part of an instance in a tile, in COCO's format without ids; None if there is none.

    Args:
        rle: the instance's mask in the whole image.
        top, left: corner of the tile.
        side: of the tile.
    """
    part = mask_util.decode(rle)[top : top + side, left : left + side]
    if not part.any():
        return None
    cut = mask_util.encode(np.asfortranarray(part))
    area = int(part.sum())
    return {
        "segmentation": {"size": list(part.shape), "counts": cut["counts"].decode()},
        "area": area,
        "bbox": mask_util.toBbox(cut).tolist(),
        "iscrowd": int(area < LEAST),
        "category_id": 1,
    }


def cut(annotation_file: Path, images: Path, output: Path, side: int) -> dict[str, Any]:
    """Write the tiles' images; returns their annotations.

    Args:
        annotation_file: COCO's format, with polygons.
        images: folder of the images.
        output: folder for the tiles, as PNG files.
        side: of a tile.
    """
    content = json.loads(annotation_file.read_text(encoding="utf-8"))
    of_image: dict[int, list[Any]] = {entry["id"]: [] for entry in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation["segmentation"])
    tiles: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    output.mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        height, width = entry["height"], entry["width"]
        masks = [
            mask_util.merge(mask_util.frPyObjects(polygons, height, width))
            for polygons in of_image[entry["id"]]
        ]
        with Image.open(images / entry["file_name"]) as file:
            picture = np.asarray(file.convert("RGB"))
        for top in corners(height, side):
            for left in corners(width, side):
                tile = picture[top : top + side, left : left + side]
                number = len(tiles) + 1
                name = f"{Path(entry['file_name']).stem}_{top}_{left}.png"
                Image.fromarray(tile).save(output / name)
                size = {"height": tile.shape[0], "width": tile.shape[1]}
                tiles.append({"id": number, "file_name": name, **size})
                for rle in masks:
                    found = cut_annotation(rle, top, left, side)
                    if found is not None:
                        ids = {"id": len(annotations) + 1, "image_id": number}
                        annotations.append({**ids, **found})
    categories = [{"id": 1, "name": "nucleus"}]
    return {"images": tiles, "categories": categories, "annotations": annotations}


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output", type=Path, help="output folder, for images/val and annotations/val.json"
    )
    parser.add_argument("--side", type=int, default=96, help="of a tile, in pixels (96)")
    args = parser.parse_args(argv)
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "nuclei_dsb2018"
    annotation_file = root / "annotations/instances_val.json"
    if not annotation_file.is_file():
        print(f"There is no {annotation_file}; set DETECTRON2_DATASETS.", file=sys.stderr)
        return 2
    content = cut(annotation_file, root / "images/val", args.output / "images/val", args.side)
    (args.output / "annotations").mkdir(parents=True, exist_ok=True)
    (args.output / "annotations/val.json").write_text(json.dumps(content))
    counted = sum(not entry["iscrowd"] for entry in content["annotations"])
    print(f"{args.output}: {len(content['images'])} tiles, {counted} instances")
    return 0


if __name__ == "__main__":
    sys.exit(main())
