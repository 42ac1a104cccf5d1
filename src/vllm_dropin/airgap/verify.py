"""The proof before the cluster: what would go wrong there, found here, step by step, with what each step found.

The steps look at the context (or at an image's root file system) and at the model folder as files; the last one serves
the folder in a network without a way out. A step that can't be taken is `not checked`, never ok.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm_dropin.airgap import candidate, image_context, image_root, lint, pins, trial
from vllm_dropin.airgap.candidate import Candidate
from vllm_dropin.airgap.image_context import Context
from vllm_dropin.airgap.report import Finding, NotChecked, Problem, Report, Step, take
from vllm_dropin.airgap.unpack import Caps, survey, unpack
from vllm_dropin.errors import ConfigurationError, ModelError
from vllm_dropin.settings.options import BY_KEY, OPTIONS, Flags

CONTEXT_CAPS = Caps(size=64 << 30, entries=10_000)
QUESTION = "What is the capital of France?"
ARCHIVES = (".tar.gz", ".tgz", ".tar")
_LINT_FAILS = ("error", "warning")
_LAST_LINES = 8
_FETCHED = (
    "Put what is fetched into the folder (vllm-dropin bundle does so with a model of the hub). A host that the cluster "
    "itself has can't be had here."
)
_RIGHTS = (
    "run it as root, or let users have network namespaces (sysctl user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns)"
)
_ROOT_RIGHTS = "an image's root is entered by chroot, as root"
_NO_FOLDER = "no model folder is given"
# What this machine knows and a cluster does not: where things are cached, ways out, the platform, how we are to listen.
_LEFT_OUT = frozenset(
    {
        "http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
        "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "XDG_STATE_HOME",
        "OPENAI_HOST", "OPENAI_PORT", "MLOPS_DEPLOYMENT_ID", "VIRTUAL_ENV",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is to be verified. `context` is an archive, a folder or an image's root; `folder` a model folder or its tar.

    `flags` are the settings' options, with the folder left out; `seconds` are for the start in the trial.
    """

    context: Path
    folder: Path | None
    flags: Flags
    environ: Mapping[str, str] = field(repr=False)
    question: str = QUESTION
    seconds: float = 1800


def verify(request: Request, scratch: Path, on_start: Callable[[str], None] = lambda name: None) -> Report:
    """Take every step. `on_start` hears each step's name before it; `scratch` is an empty folder on a large disk.

    Raises ConfigurationError when there is nothing to verify at a path. Everything else is in the report.
    """
    for path in (request.context, request.folder):
        if path is not None and not path.exists():
            raise ConfigurationError(f"there is nothing at {path}", "Correct the path.")
    return Report(tuple(_Verification(request, scratch, on_start).run()))


class _Verification:
    """One run; what an earlier step found is there for the later ones."""

    def __init__(self, request: Request, scratch: Path, on_start: Callable[[str], None]) -> None:
        self._request = request
        self._scratch = scratch
        self._on_start = on_start
        self._root = request.context.resolve() if image_root.is_one(request.context) else None
        self._place: Path | None = None
        self._context: Context | None = None
        self._candidate: Candidate | None = None

    def run(self) -> list[Step]:
        steps = {
            "unpack": self._unpack,
            "contents": self._contents,
            "dockerfile": self._lint,
            "base": lambda: image_context.check_base(self._read()),
            "requirements": lambda: pins.check_requirements(self._read()),
            "wheelhouse": lambda: pins.check_wheelhouse(self._read()),
            "folder": self._resolve,
            "weights": self._weights,
            "run": self._try,
        }
        done = []
        for name, work in steps.items():
            self._on_start(name)
            done.append(take(name, work))
        return done

    def _unpack(self) -> Finding:
        path = self._request.context
        if self._root is not None:
            return Finding("an image's root file system, looked at as it is")
        if path.is_dir():
            found = survey(path)
            self._place = path
            return Finding(f"a folder: {found.files} files, {_size(found.size)}")
        _expect_archive(path)
        found = unpack(path, self._scratch / "context", CONTEXT_CAPS)
        self._place = found.folder
        return Finding(f"{found.files} files, {_size(found.size)}", facts={"sha256": pins.digest(path)})

    def _read(self) -> Context:
        """The context, when it is one."""
        if self._root is not None:
            raise NotChecked("an image's root has no Dockerfile and no lock files any more")
        if self._context is None:
            raise NotChecked("the context could not be unpacked" if self._place is None else "the context is not whole")
        return self._context

    def _contents(self) -> Finding:
        if self._root is not None:
            return image_root.compare(self._root)
        if self._place is None:
            raise NotChecked("the context could not be unpacked")
        self._context = image_context.read(self._place)
        return image_context.compare(self._context)

    def _lint(self) -> Finding:
        if self._root is None and self._place is not None and not (self._place / "Dockerfile").is_file():
            raise NotChecked("there is no Dockerfile")
        if self._root is not None or self._place is None:
            self._read()
        assert self._place is not None
        program = lint.find_hadolint()
        if program is None:
            raise NotChecked("hadolint is not installed: pip install 'vllm-dropin[verify]'")
        found = lint.lint(program, self._place / "Dockerfile")
        problems = tuple(
            Problem(str(finding), f"hadolint explains {finding.code}; build the context again rather than mend it.")
            for finding in found
            if finding.level in _LINT_FAILS
        )
        warnings = tuple(str(finding) for finding in found if finding.level not in _LINT_FAILS)
        return Finding(
            "" if problems else f"hadolint finds {'nothing' if not found else 'no fault'}", problems, warnings
        )

    def _resolve(self) -> Finding:
        given = self._request.folder
        if given is None:
            raise NotChecked(_NO_FOLDER)
        folder = given
        if not given.is_dir():
            _expect_archive(given)
            folder = unpack(given, self._scratch / "model").folder
        flags = self._request.flags
        if self._root is not None:
            self._candidate = candidate.read_for_image(folder, flags.params, self._environ)
        else:
            told = Flags(str(folder), self._options, flags.params, flags.engine_args)
            self._candidate = candidate.read(told, self._environ)
        warnings = [*self._candidate.warnings]
        engine = self._candidate.engine
        if engine and self._context and engine.version.partition("+")[0] != self._context.vllm:
            warnings.append(f"the run is with this machine's vLLM {engine.version}; the image has {self._context.vllm}")
        return Finding(str(self._candidate), warnings=tuple(warnings))

    def _weights(self) -> Finding:
        found = self._read_folder()
        try:
            return candidate.look_at_weights(found, self._state_dir)
        except ModelError:
            self._candidate = None  # nothing to try
            raise

    def _try(self) -> Finding:
        found = self._read_folder()
        scratch = self._scratch / "trial"
        scratch.mkdir()
        outcome = trial.hold(self._plan(found), scratch)
        if not outcome.isolated:
            raise NotChecked(f"{outcome.why}: {_RIGHTS if self._root is None else _ROOT_RIGHTS}")
        hosts = ", ".join(dict.fromkeys(map(str, outcome.wanted)))
        facts = {**asdict(outcome), "engine": str(found.engine.path) if found.engine else "the image's"}
        if outcome.problem:
            return Finding("", (Problem(_explained(outcome, hosts), _remedy(outcome)),), (), facts)
        warnings = [f"it serves, though {hosts}: there is no network"] if hosts else []
        if found.hook and not outcome.shielded:
            warnings.append(f"what custom.py wrote is in {found.folder}: no overlay can be had there")
        engine = f"this machine's {found.engine.distribution} {found.engine.version}" if found.engine else "its engine"
        detail = f"ready after {outcome.ready_seconds:g} s on {engine}, without network; said {_short(outcome.answer)}"
        return Finding(detail, warnings=tuple(warnings), facts=facts)

    def _read_folder(self) -> Candidate:
        if self._request.folder is None:
            raise NotChecked(_NO_FOLDER)
        if self._candidate is None:
            raise NotChecked("the model folder can't be served")
        return self._candidate

    @property
    def _state_dir(self) -> Path:
        return self._scratch / "state"

    @property
    def _options(self) -> dict[str, str]:
        return {**self._request.flags.options, "state_dir": str(self._state_dir)}

    @property
    def _environ(self) -> dict[str, str]:
        """This machine's, without what a cluster does not have; all that is cached comes from the scratch folder."""
        gone = {option.variable for option in OPTIONS} | {option.contract for option in OPTIONS if option.contract}
        kept = {"VLLM_DROPIN_ENGINE_PYTHON", "VLLM_DROPIN_HOOK_PATH", "VLLM_DROPIN_HOOK_TIMEOUT", "RUNTIME_PARAMS_FILE"}
        left_out = (gone - kept) | _LEFT_OUT | {name.upper() for name in _LEFT_OUT}
        environ = {
            name: value
            for name, value in self._request.environ.items()
            if name not in left_out and not name.startswith("DATAROBOT_")
        }
        home = self._scratch / "home"
        home.mkdir(exist_ok=True)
        places = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "HF_HOME": home / "huggingface"}
        return {**environ, **{name: str(place) for name, place in places.items()}}

    def _plan(self, found: Candidate) -> trial.Plan:
        request = self._request
        words = ["--address", f"127.0.0.1:{trial.PORT}", "--auth", "none", "--with-error-server"]
        for param in request.flags.params:
            words += ["--param", param]
        if request.flags.engine_args:
            words += ["--", *request.flags.engine_args]
        if self._root is not None:
            argv = [image_root.PROGRAM, "serve", image_root.CODE_DIR, *words]
            environ = image_root.environ(self._root, request.environ)
        else:
            options = [text for key, value in self._options.items() for text in (BY_KEY[key].flag, value)]
            argv = [
                sys.executable,
                "-P",
                "-m",
                "vllm_dropin.cli.main",
                "serve",
                str(found.folder),
                *options,
                *words,
            ]
            environ = self._environ
        return trial.Plan(
            tuple(argv), found.folder.resolve(), request.question, found.column, request.seconds, self._root, environ
        )


def _expect_archive(path: Path) -> None:
    if not path.is_file():
        raise ConfigurationError(f"{path} is neither a folder nor a file", "Name an archive or a folder.")
    if not path.name.endswith(ARCHIVES):
        raise ConfigurationError(f"{path.name} is no kind of archive that is taken", f"Taken: {', '.join(ARCHIVES)}.")


def _explained(outcome: trial.Outcome, hosts: str) -> str:
    """The host first: it is the cause, and what follows its consequence."""
    problem = f"{hosts}, and there is no network: {outcome.problem}" if hosts else outcome.problem
    if outcome.phase == "failed":  # then the problem is in the words of `serve`, and the log repeats them
        return problem
    return problem + "".join(f"\n  | {line[:300]}" for line in outcome.log[-_LAST_LINES:])


def _remedy(outcome: trial.Outcome) -> str:
    if not outcome.wanted:
        return outcome.remedy
    return f"{_FETCHED} {outcome.remedy}".rstrip()


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _short(text: str | None) -> str:
    text = " ".join((text or "").split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
