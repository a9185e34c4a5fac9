"""The built-in datasets, registered in Detectron2's catalogs by importing this package."""

from semask.data.datasets.ade20k import prepare_ade20k, register_ade20k
from semask.data.datasets.camvid import register_camvid
from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.cityscapes import prepare_cityscapes, register_cityscapes
from semask.data.datasets.coco_folder import register_coco_folder
from semask.data.datasets.coco_stuff import register_coco_stuff
from semask.data.datasets.folder import register_config_folders, register_folder
from semask.data.datasets.nuclei import register_nuclei
from semask.data.datasets.pairs import PairingError, load_sem_seg_pairs
from semask.data.datasets.panoptic_folder import register_panoptic_folder
from semask.data.datasets.scenes.dataset import register_scenes
from semask.data.datasets.scenes.panoptic import register_scenes_panoptic

# The functions of `semask prepare NAME`.
PREPARATIONS = {"ade20k": prepare_ade20k, "cityscapes": prepare_cityscapes}

__all__ = [
    "PREPARATIONS",
    "PairingError",
    "datasets_root",
    "layout_hint",
    "load_sem_seg_pairs",
    "register_coco_folder",
    "register_config_folders",
    "register_folder",
    "register_panoptic_folder",
    "register_sem_seg",
]

register_scenes()
register_scenes_panoptic()
register_camvid()
register_ade20k()
register_cityscapes()
register_coco_stuff()
register_nuclei()
