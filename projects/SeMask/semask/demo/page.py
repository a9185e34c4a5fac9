"""The gradio page. It keeps no uploads on disk and connects to no other server."""

import contextlib
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from semask.demo.answer import Answer, Demo, problem
from semask.errors import ConfigError
from semask.report.page import template_environment

logger = logging.getLogger(__name__)

# Set regardless of the user's environment: no telemetry, tunnel or run history in the browser.
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# The browser loads nothing from other hosts, whatever the version of gradio requests.
_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
# Number of uploads that wait for the model; further ones wait in gradio's queue.
_WAITING = 16
# Uploads that were never predicted are deleted after this number of seconds.
_ABANDONED = 600


def check_gradio() -> None:
    """
    Raises:
        ConfigError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(
            "The page needs the package gradio, which is not installed: pip install 'semask[demo]'."
        )


@contextlib.contextmanager
def serving(
    demo: Demo,
    *,
    facts: str = "",
    host: str = "127.0.0.1",
    port: int | None = None,
    max_size: int = 100 * 2**20,
    min_score: float = 0.5,
) -> Iterator[str]:
    """Serve the page while the ``with`` block runs.

    Args:
        demo: the model.
        facts: a description of the model, shown on the page.
        host: the address to listen on; "0.0.0.0" = all addresses of this machine.
        port: None = the first free port from 7860.
        max_size: maximum size of an upload, in bytes.
        min_score: initial value of the slider for instances.

    Yields:
        The address of the page.

    Raises:
        ConfigError: gradio is not installed, or the address cannot be used, for instance because
            the port is in use.
    """
    check_gradio()
    _check_address(host, port)
    with (
        tempfile.TemporaryDirectory(prefix="semask_demo_") as folder,
        _environment({"GRADIO_TEMP_DIR": folder}),
    ):
        blocks = _page(demo, Path(folder).resolve(), facts, max_size, min_score)
        blocks.queue(max_size=16)
        try:
            _, url, _ = blocks.launch(**_launch_options(host, port, max_size))
            yield url
        finally:
            blocks.close(verbose=False)


def _check_address(host: str, port: int | None) -> None:
    """
    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        place = host if port is None else f"{host}, port {port}"
        raise ConfigError(
            f"The page cannot be served at {place}: {error.strerror}. Use another --host or --port."
        ) from error


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and restore them afterwards."""
    wanted = {**_ENVIRONMENT, **more}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _launch_options(host: str, port: int | None, max_size: int) -> dict[str, Any]:
    import gradio as gr  # optional dependency, includes starlette
    from starlette.middleware import Middleware

    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "inbrowser": False,
        "quiet": True,
        "prevent_thread_lock": True,
        "max_file_size": max_size,
        "footer_links": [],
        "enable_monitoring": False,
        "state_session_capacity": 16,
        "theme": gr.themes.Default(
            primary_hue="blue",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css": _CSS,
        "app_kwargs": {"middleware": [Middleware(_WithPolicy)]},
    }


class _WithPolicy:
    """ASGI middleware that adds the policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY)
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


# A toast reports errors of an upload; gradio's error overlay would cover the upload area.
_CSS = """
#upload [data-testid="status-tracker"] { display: none !important; }
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
#about h1 { margin: 8px 0 0; font-size: 24px; font-weight: 650; }
#about p { margin: 2px 0 0; overflow-wrap: anywhere;
  color: color-mix(in srgb, var(--body-text-color) 66%, transparent); }
"""


def _handlers(
    demo: Demo, folder: Path, max_size: int
) -> tuple[Callable[..., list[Any]], Callable[..., Any]]:
    """The functions that answer an upload, and a moved slider.

    Args:
        demo: the model.
        folder: the parent of gradio's folders.
        max_size: maximum size of an upload, in bytes.
    """
    import gradio as gr  # optional dependency, reads the environment on import

    model = threading.Lock()

    def upload(
        file: dict[str, Any] | None,
        score: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (gradio looks for it here)
    ) -> list[Any]:
        """Predict a file, and delete it."""
        if file is None:
            return [None, "", None, gr.skip()]
        path = _taken(Path(file["path"]), folder)

        def show(done: int, total: int) -> None:
            progress((done, max(done, total)), unit="frames")

        try:
            if path.is_file() and path.stat().st_size > max_size:
                answer = problem(f"'{path.name}' is larger than {_megabytes(max_size)}.")
            else:
                with model:
                    answer = demo.answer(path, min_score=score, progress=show)
        except Exception as error:
            logger.exception("Predicting %s failed.", path.name)
            answer = problem(
                f"Something went wrong with '{path.name}' ({type(error).__name__}). The terminal "
                "that the page was started in has the details."
            )
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)
        shown = gr.update(visible=answer.prediction is not None)
        return [None, answer.html, answer, shown]

    def draw(answer: Answer | None, score: float) -> Any:
        """Redraw the last prediction with another minimum score."""
        if answer is None or answer.prediction is None:
            return gr.skip()
        return demo.render(answer.prediction, answer.name, min_score=score).html

    return upload, draw


def _page(demo: Demo, folder: Path, facts: str, max_size: int, min_score: float) -> Any:
    """Build the components and connect their events."""
    import gradio as gr  # optional dependency, reads the environment on import

    upload, draw = _handlers(demo, folder, max_size)
    templates = template_environment("semask.demo")

    def text(name: str, **values: Any) -> str:
        return templates.get_template(name).render(values)

    with gr.Blocks(
        title="SeMask",
        analytics_enabled=False,
        delete_cache=(_ABANDONED, _ABANDONED),
    ) as blocks:
        gr.HTML(text("about.html.j2", facts=facts, size=_megabytes(max_size)), elem_id="about")
        # "image" instead of suffixes: phones then offer the camera.
        file = gr.File(
            label="Image or video",
            file_types=["image", "video", ".npy", ".tif", ".tiff"],
            height=140,
            elem_id="upload",
        )
        score = gr.Slider(0, 1, min_score, step=0.01, label="Minimum score", visible=False)
        shown = gr.HTML(
            "",
            css_template=text("page.css"),
            js_on_load=text("page.js"),
            apply_default_css=False,
            elem_id="answer",
        )
        state = gr.State(time_to_live=3600)
        file.upload(
            upload,
            [file, score],
            [file, shown, state, score],
            preprocess=False,  # which would copy the file
            concurrency_limit=_WAITING,  # accept the file at once; it waits for the model
            api_visibility="private",
            show_progress="full",
            show_progress_on=shown,
        )
        score.release(draw, [state, score], shown, concurrency_limit=1, api_visibility="private")
    return blocks


def _taken(upload: Path, folder: Path) -> Path:
    """Move an upload into a folder of its own, before anything else is done.

    gradio names its folders after the content, so two users can share one.

    Args:
        upload: the path from the browser; ignored unless it is in a folder of gradio.
        folder: the parent of gradio's folders.

    Returns:
        The new path. The file is missing if another session has just moved it.
    """
    path = Path(tempfile.mkdtemp(dir=folder)) / upload.name
    if upload.resolve().parent.parent == folder:
        with contextlib.suppress(FileNotFoundError):
            upload.rename(path)
    return path


def _megabytes(size: int) -> str:
    return f"{size / 2**20:g} MiB"
