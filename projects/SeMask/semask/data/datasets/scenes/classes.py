"""The classes of the drawn scenes, and what they are made of."""

CLASSES = ["sky", "cloud", "sun", "mountain", "snow", "lake", "grass", "tree", "hay", "road"]
SKY, CLOUD, SUN, MOUNTAIN, SNOW, LAKE, GRASS, TREE, HAY, ROAD = range(10)
COLORS = [
    [135, 190, 235],
    [240, 240, 245],
    [255, 215, 40],
    [130, 120, 115],
    [200, 225, 250],
    [40, 100, 190],
    [150, 205, 90],
    [30, 115, 50],
    [225, 150, 50],
    [85, 85, 95],
]
# The two classes made of each material.
CLASSES_OF_MATERIAL = {
    "blue": (SKY, LAKE),
    "white": (CLOUD, SNOW),
    "yellow": (SUN, HAY),
    "grey": (MOUNTAIN, ROAD),
    "green": (GRASS, TREE),
}
MATERIAL_OF_CLASS = {label: name for name, pair in CLASSES_OF_MATERIAL.items() for label in pair}
