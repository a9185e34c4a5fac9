"""Drawing: label maps, instances, palettes."""
