"""A page to try a model: ``answer`` predicts and renders, ``page`` is the gradio part."""
