"""Batches of images, exact after a resume, with unreadable files skipped."""
