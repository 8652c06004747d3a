"""What new disks of a mount are (`-o new_base`): clones of a template that the mount may read. Blocks."""

from __future__ import annotations

import os

from fvdfs.commands.clone import Plan, plan_clones
from fvdfs.errors import ImageError, UnstatedFormat, UsageError
from fvdfs.image.policy import Policy, looks_like
from fvdfs.store.host import open_path
from fvdfs.store.locations import is_local, parse_location


def new_disks(folder: str, template: str, policy: Policy) -> Plan:
    """What `fvdfs clone` would make in this folder. Raises UsageError, ImageBusy, ImageError, OSError."""
    image = os.path.join(folder, "new disks")  # whose base it is, for messages
    base_format = ""
    try:
        if is_local(template):
            os.close(policy.open_file(image, "new_base", template)[0])
            base_format = _format(image, template, policy)
        else:
            policy.check_url(image, "new_base", parse_location(template))
    except UnstatedFormat as error:
        what = f"new_base={template}: looks like {error.looks_like}"
        raise UsageError(f"-o {what}; say what it is: -o base_format={error.looks_like}, or raw") from error
    except ImageError as error:
        raise UsageError(f"-o {error.reason}") from error
    return plan_clones(folder, template, base_format, "", policy.secret_file)


def _format(image: str, template: str, policy: Policy) -> str:
    """The template's, which the mount accepts where nobody states one; empty: as its name says."""
    if template.endswith(".fvd"):
        return ""
    store = open_path(template, writable=False)
    try:
        guess = looks_like(store)
    finally:
        store.close()
    return policy.unstated_format(image, "new_base", template, guess) if guess else ""
