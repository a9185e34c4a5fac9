"""A page to try a model: ``answer`` predicts and draws, ``page`` shows it with gradio."""
