"""Start of a local Ray or connection to a running one, without the side effects that Ray has on this process."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from betterhalf.cluster.head import require_answer
from betterhalf.config.schema import ClusterConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.process import usable_cores
from betterhalf.words import counted

_JOINED: dict[str, Any] = {
    "log_to_driver": False,
    "logging_level": "ERROR",
    "configure_logging": False,
}
"""Options of `ray.init` that keep Ray's output from the terminal."""

_CPUS_OF_ONE = 8
"""Maximum number of CPUs that a local Ray may declare for each CPU of the host, so that a laptop can try a cluster."""

_SLOW_START = "timed out during startup"
"""Part of Ray's error message if its processes start too slowly."""

_LOCAL: dict[str, Any] = {**_JOINED, "include_dashboard": False}
"""Options of `ray.init` for a local Ray."""


def require_ray() -> None:
    """Require the package `ray`, and that it can be imported.

    Raises:
        InputError: it is installed and broken.
        MissingExtraError: it is not installed.
    """
    found = importlib.util.find_spec("ray")
    # A plain folder named ray, such as Ray's own /tmp/ray, is found as a namespace package, which has no origin.
    if found is None or found.origin is None:
        raise MissingExtraError(
            "cluster.backend=ray needs the package ray; install it with `pip install betterhalf[ray]`, or with "
            "scripts/install --ray in a checkout, or leave out cluster.backend to run in one process"
        )
    try:
        with own_hooks():
            importlib.import_module("ray")
    except Exception as error:
        raise InputError(
            f"cluster.backend=ray needs the package ray, and {found.origin} cannot be imported "
            f"({type(error).__name__}: {_one_line(error)}). Install it again with `pip install --force-reinstall "
            "betterhalf[ray]`, or leave out cluster.backend to run in one process."
        ) from error


def check_session(cluster: ClusterConfig) -> None:
    """Run those checks of `open_session` that start no process.

    Raises:
        InputError: Ray cannot be imported, no cluster answers at the address, or a local Ray would lack CPUs or GPUs.
        MissingExtraError: Ray is not installed.
    """
    require_ray()
    if cluster.address is not None:
        with own_hooks():
            use_token()
            require_answer(cluster.address)
        return
    _require_cpus(cluster, usable_cores())
    import torch

    gpus = torch.cuda.device_count()
    if cluster.needed_gpus > gpus:
        raise InputError(
            f"cluster.trainers={cluster.trainers} with {counted(cluster.trainer.gpus, 'GPU')} each and cluster.engines="
            f"{cluster.engines} with {cluster.engine.gpus:g} need {counted(cluster.needed_gpus, 'GPU')}, and this host "
            f"has {gpus}. Lower them, share GPUs with cluster.placement=colocated, or join a cluster with "
            "cluster.address."
        )


def _require_cpus(cluster: ClusterConfig, cores: int) -> None:
    """Require that the processes of a local Ray can share the host's CPUs.

    Raises:
        InputError: one process needs more CPUs than there are, or all together need more than `_CPUS_OF_ONE` times
            as many.
    """
    for side, cpus in (("trainer", cluster.trainer.cpus), ("engine", cluster.engine.cpus)):
        if cpus > cores:
            raise InputError(
                f"cluster.{side}.cpus={cpus}, and this host has {counted(cores, 'CPU')}. Lower it "
                f"(cluster.{side}.threads alone sets the number of threads), or join a cluster with cluster.address."
            )
    if cluster.needed_cpus > _CPUS_OF_ONE * cores:
        raise InputError(
            f"the run needs {counted(cluster.needed_cpus, 'CPU')} for its {cluster.processes}, and this host has "
            f"{cores}: more than {_CPUS_OF_ONE} times as many would make processes exceed their time limits. Lower "
            "cluster.trainers, cluster.engines or their cpus, or join a cluster with cluster.address."
        )


class SlowStartError(Exception):
    """The processes of a local Ray took longer to start than Ray waits for them, for example on a busy host."""


def start_local(cluster: ClusterConfig, folder: Path) -> None:
    """Start a local Ray for this run, with its sockets and logs in `folder`.

    Raises:
        InputError: it does not start.
        SlowStartError: it was too slow, and may start in another attempt; processes of this attempt may still run.
    """
    import ray

    with quiet() as said, _own_sigterm():
        try:
            ray.init(
                address="local",
                num_cpus=max(usable_cores(), cluster.needed_cpus),
                # No process requests this resource, but without it Ray refuses to start on a host short of memory.
                _memory=2**30,
                _temp_dir=str(folder),
                # With Ray's default of 15, ranks and engines would get a thirtieth of a core next to other work.
                _system_config={"worker_niceness": 0},
                **_LOCAL,
            )
        except (Exception, SystemExit) as error:
            ray.shutdown()
            text = f"{error} {said.getvalue()}".strip()
            message = (
                f"Ray cannot start on this host ({text[-2000:]}); free memory, processes or space in {folder.parent}, "
                "or join a running cluster with cluster.address"
            )
            raise (SlowStartError(message) if _SLOW_START in str(error) else InputError(message)) from error
        except BaseException:
            ray.shutdown()
            raise


def join_cluster(address: str) -> None:
    """Connect to a running cluster.

    Raises:
        InputError: it runs another version of Ray or Python, or refuses the connection.
    """
    import ray

    with quiet(), _own_sigterm():
        try:
            use_token()
            ray.init(address=address, **_JOINED)
        except (Exception, SystemExit) as error:
            ray.shutdown()
            mine = f"This process runs Ray {ray.__version__} and Python {platform.python_version()}."
            raise InputError(
                f"the cluster at cluster.address={address} cannot be joined ({_one_line(error)}). {mine} Start the "
                "cluster with the same versions, and betterhalf on one of its hosts. If the cluster asks for a token, "
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
            ) from error
        except BaseException:
            ray.shutdown()
            raise


def use_token() -> None:
    """Use this user's token if there is one: `ray start` does so, but `ray.init` on a running cluster does not."""
    from ray._private.authentication import authentication_token_setup as tokens

    with quiet():
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def silence_notices() -> None:
    """Hide Ray's notices of ended processes, which `log_to_driver` does not hide; the run reports them itself."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_args, **_keywords: None


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Return a context that hides Ray's output and warnings, and yields the captured output."""
    said, logger = io.StringIO(), logging.getLogger("ray")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield said
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the SIGTERM handler while Ray starts: Ray's own raises SystemExit, which looks like a failed start."""
    from ray._private import utils

    install = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = install


@contextlib.contextmanager
def own_hooks() -> Iterator[None]:
    """Restore the SIGTERM handler and `sys.excepthook`, which Ray replaces, at the end of the context."""
    main = threading.current_thread() is threading.main_thread()
    hook, handler = sys.excepthook, signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        sys.excepthook = hook
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
