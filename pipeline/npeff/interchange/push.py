"""Upload of a bundle to the Hugging Face Hub, or to a server with its interface (``HF_ENDPOINT``)."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from npeff.errors import NpeffError, as_one_line, hide_value_of
from npeff.interchange.bundle import BundleOptions, write_bundle
from npeff.runs.config_reading import ConfigError

_ADDRESS = re.compile(r"hf://(?:datasets/)?([\w.-]{1,96}/[\w.-]{1,96})/?", re.ASCII)


class PushError(NpeffError):
    """The hub refused an upload, or did not answer."""


def push_bundle(
    run_dir: str | Path, address: str, options: BundleOptions | None = None, *, public: bool = False
) -> str:
    """Write a run as a bundle, and upload the bundle to a data set repository of the hub.

    The repository is created if it does not exist. The upload is one commit. Files of the repository that are not in
    the bundle stay.

    Args:
        run_dir: The run directory.
        address: ``hf://OWNER/NAME``.
        options: What the bundle contains.
        public: Whether a new repository is public. An existing one stays as it is.

    Returns:
        The address of the repository on the web.

    Raises:
        ConfigError: The address or an option is not valid, or huggingface_hub is not installed, or there is no access
            token.
        PushError: The hub refuses the upload or cannot be reached.
        NpeffError: As `npeff.interchange.bundle.write_bundle`.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"{address!r:.120} is not an address of the hub: give hf://OWNER/NAME")
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError("npeff push needs the package huggingface_hub: pip install 'npeff-pipeline[hf]'") from None
    token = huggingface_hub.get_token()
    if not token:
        raise ConfigError("there is no access token of the hub: set HF_TOKEN, or log in with `hf auth login`")
    hide_value_of("HF_TOKEN")
    hub = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
        bundle = write_bundle(run_dir, Path(folder, "bundle"), options)
        try:
            made = hub.create_repo(found[1], repo_type="dataset", private=not public, exist_ok=True)
            hub.upload_folder(
                repo_id=found[1], folder_path=bundle, repo_type="dataset", commit_message="Upload by npeff push"
            )
        except Exception as error:  # the client and its libraries raise any exception
            raise PushError(f"cannot push to {address}: {as_one_line(error)}") from None
    return str(made)
