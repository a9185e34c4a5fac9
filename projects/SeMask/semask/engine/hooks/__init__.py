"""What happens during training beside Detectron2's own hooks."""
