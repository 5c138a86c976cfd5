"""The thinking markers of an LRM, found by rendering its own chat template (design.md; families of ecosystem.md, 4a).

A marker is text, not a token id: in some families it is one special token, in others several ordinary tokens. What
goes on in ids is therefore decided later, per sample and by character offsets (calibration.py). Here only the text is
settled, what stands around it, and whether the template itself writes the opener into the generation prompt.
Holds nothing but the tokenizer.

A chat template is a stranger's program. transformers renders it in jinja's immutable sandbox, where it reaches neither
files nor Python; that bounds what it can touch, not what it takes. So a rendering gets a time, a share of memory and a
length, and a template that computes powers is refused: one operation on huge numbers cannot be interrupted.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError, RecipeError, StreamMergeError
from .io.checkpoint import side_files
from .recipe import Thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Profile:
    """One family's markup: opener, closer, and the text that its models write next to them."""

    open: str
    close: str
    after_open: str = "\n"
    before_close: str = "\n"
    after_close: str = "\n\n"


# Families that mark their thinking by prose alone (Granite 3.2) have no row: there is nothing to protect by position.
# Where two profiles have the same evidence the first one wins, so the most common markup comes first.
PROFILES = (
    Profile("<think>", "</think>"),  # DeepSeek-R1 and distills, QwQ, Qwen3, GLM, Kimi-K2, Nemotron, Olmo, Phi-4, …
    Profile("[THINK]", "[/THINK]", "", "", ""),  # Magistral 1.1+, Ministral 3
    Profile("<seed:think>", "</seed:think>"),  # Seed-OSS
    Profile("<thought>", "</thought>"),  # EXAONE-Deep
    Profile("◁think▷", "◁/think▷", "", "", ""),  # Kimi k1.5 and VL
    Profile("<|START_THINKING|>", "<|END_THINKING|>", "", "", "<|START_RESPONSE|>"),  # Cohere Command-A reasoning
    Profile("<|inner_prefix|>", "<|inner_suffix|>", "", "", ""),  # Apertus
    Profile("<mm:think>", "</mm:think>"),  # MiniMax M3
    Profile("<|begin_of_thought|>", "<|end_of_thought|>"),  # early OpenThoughts
    Profile("<|channel|>analysis<|message|>", "<|end|>", "", "",
            "<|start|>assistant<|channel|>final<|message|>"),  # gpt-oss (harmony)
    Profile("<|channel>thought", "<channel|>", "\n", "\n", ""),  # Gemma 4
    Profile("<|open|>think<|sep|>", "<|close|>think<|sep|>", "", "", "<|open|>response<|sep|>"),  # Kimi K3
)
RENDER_SECONDS = 10  # real templates take milliseconds
_RENDER_BYTES = 1 << 30  # beyond what the process holds already
_FRAME = 1 << 20  # characters that a template may add to a prompt, and of its own source
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class Markers:
    """The markers of one LRM as text, the text that belongs next to them, and how they were found."""

    open: str
    close: str
    after_open: str
    before_close: str
    after_close: str
    opener_in_prompt: bool  # the template ends its generation prompt with the opener; else the model emits it
    evidence: str  # one line for the report


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the checkpoint directory `path`, as AutoTokenizer reads it: local, never remote code.

    Raises InputError when it cannot be loaded, gives no character offsets (is not "fast"), or has no chat template.
    """
    from transformers import AutoTokenizer

    # For some families AutoTokenizer makes up an empty tokenizer where a directory has no vocabulary at all.
    if not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{path}: no tokenizer here (looked for {', '.join(TOKENIZER_FILES)}); the LRM's directory "
                         "must hold its tokenizer files: copy them from where the checkpoint came from")
    side_files(path)  # a tokenizer.json that is a link to somebody's private file is refused before it is read
    with answered(f"{path}: the tokenizer cannot be loaded",
                  "check that its files are complete and need no remote code, which streammerge never runs"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise InputError(f"{path}: {type(tokenizer).__name__} gives no character offsets, which place markers and "
                         "spans on tokens; wanted a tokenizer.json beside the checkpoint (a 'fast' tokenizer)")
    if not tokenizer.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template; add the LRM's chat_template.jinja (or the key "
                         "chat_template of tokenizer_config.json): calibration runs in the LRM's own format")
    return tokenizer


@contextmanager
def answered(what: str, advice: str) -> Iterator[None]:
    """Whatever transformers, jinja and tokenizers raise over a stranger's files is an InputError: `what` and why."""
    try:
        yield
    except StreamMergeError:
        raise
    except BaseException as error:
        # a panic of the Rust tokenizers is no Exception; everything else that is none (Ctrl-C) is not about the files
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({type(error).__name__}: {str(error)[:300]}); {advice}") from error


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """`prompt` as the one user message of the LRM's own template, up to where the model starts to write.

    Hybrid models are asked to think under both names in use; templates ignore names that they do not know.
    Raises InputError where the template fails or takes too much.
    """
    message = [{"role": "user", "content": prompt}]
    where = tokenizer.name_or_path or "the LRM"
    with answered(f"{where}: the chat template cannot render a single user message", "mend the LRM's chat_template"):
        rendered = _bounded(lambda: tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False, enable_thinking=True, thinking=True
        ))
        if len(rendered) > 4 * len(prompt) + _FRAME:
            raise ValueError(f"it makes {len(rendered)} characters of a message of {len(prompt)}")
    return rendered


def _bounded(render: Callable[[], str]) -> str:
    """`render()`, or TimeoutError after RENDER_SECONDS, MemoryError beyond _RENDER_BYTES.

    A timer raises in this thread, which Python delivers between two of its instructions: loops end, a single long
    operation does not. (A signal could do no more, and belongs to the program that imports us.)
    """
    caller, lock, over = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(TimeoutError))

    timer = threading.Timer(RENDER_SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        with address_space(_RENDER_BYTES):
            return render()
    except TimeoutError:
        raise TimeoutError(f"it takes longer than {RENDER_SECONDS} seconds") from None
    finally:
        with lock:
            over = True
        timer.cancel()


@contextmanager
def address_space(beyond: int) -> Iterator[None]:
    """The process may not grow by more than `beyond` bytes here: allocations fail with MemoryError instead.

    Soft limit, put back at the end; nothing happens where the kernel has none (macOS) or a tighter one is set.
    """
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted = pages * resource.getpagesize() + beyond
    except (ImportError, OSError):
        yield
        return
    if soft != resource.RLIM_INFINITY and soft <= wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _check_template(source: str) -> None:
    """ValueError for a template that no rendering should be tried on."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(source) > _FRAME:
        raise ValueError(f"it is {len(source)} characters long, wanted at most {_FRAME}")
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source)  # transformers' own tag
    parsed = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    if parsed.find(nodes.Pow):
        raise ValueError("it computes a power, which can take for ever and which no known template needs")


def single_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int | None:
    """The id of `text` when it is one entry of the vocabulary that the tokenizer also produces, else None."""
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or tokenizer.convert_ids_to_tokens(token) != text:  # unknown text maps to unk
        return None
    return token if token in tokenizer.encode(text, add_special_tokens=False) else None


def find_markers(tokenizer: PreTrainedTokenizerFast, thinking: Thinking, path: Path) -> Markers:
    """The markers that the recipe names, or else those for which the LRM at `path` itself gives evidence.

    Evidence, in order: an opener at the end of the generation prompt; an opener in the template's source or in a
    rendered prompt; opener and closer as single vocabulary tokens.
    Raises RecipeError where only one marker is named and its partner is unknown; InputError where there is no
    evidence, the template cannot be rendered, or the tokenizer cannot spell a marker.
    """
    where = _tokenizer_file(path)
    named = _named(thinking)
    with answered(f"{path}: the chat template cannot be used", "mend the LRM's chat_template"):
        source = tokenizer.get_chat_template()
        _check_template(source)
    rendered = render_prompt(tokenizer, "Hello")
    with answered(f"{where}: the tokenizer fails on its own markers", "copy it from where the checkpoint came from"):
        profile, evidence = named or _detected(tokenizer, rendered, source, where)
        for key, text in (("thinking.open", profile.open), ("thinking.close", profile.close)):
            _check_spelling(tokenizer, text, key, where)
    end = rendered.rstrip()
    if end.endswith(profile.close):
        raise InputError(f"{path}: the chat template ends its generation prompt with {profile.close!r}, so the model "
                         "starts after its thinking; wanted a template that lets it think (some need a switch inside)")
    return Markers(**vars(profile), opener_in_prompt=end.endswith(profile.open), evidence=evidence)


def _named(thinking: Thinking) -> tuple[Profile, str] | None:
    """The recipe's own markers; one alone is completed from the table of families."""
    given = {key: getattr(thinking, key).strip() for key in ("open", "close") if getattr(thinking, key) != "auto"}
    if not given:
        return None
    for key, text in given.items():
        if not text:
            raise RecipeError(f"thinking.{key} is empty; write the marker's text, or auto")
    known = [p for p in PROFILES if all(getattr(p, key) == text for key, text in given.items())]
    if known:
        return known[0], f"named in the recipe: {known[0].open!r} … {known[0].close!r}"
    if len(given) == 1:
        (key, text), other = next(iter(given.items())), "close" if "open" in given else "open"
        raise RecipeError(f"thinking.{key} is {text!r} but thinking.{other} is auto, and no known family has that "
                          f"marker; give both thinking.open and thinking.close, or neither")
    profile = Profile(**given)
    return profile, f"named in the recipe: {profile.open!r} … {profile.close!r}"


def _detected(tokenizer, rendered: str, source: str, where: Path) -> tuple[Profile, str]:
    """The first profile with the strongest kind of evidence, and that evidence in words."""
    for profile in PROFILES:
        if rendered.rstrip().endswith(profile.open):
            return profile, f"the chat template ends its generation prompt with {profile.open!r}"
    # A closer proves nothing here: harmony's <|end|> is the end of any turn in other families.
    for profile in PROFILES:
        for text, name in ((source, "the chat template's source"), (rendered, "a rendered prompt")):
            if profile.open in text:
                return profile, f"{profile.open!r} occurs in {name}; the model emits it"
    for profile in PROFILES:
        ids = [single_token(tokenizer, text) for text in (profile.open, profile.close)]
        if None not in ids:
            return profile, (f"{profile.open!r} and {profile.close!r} are vocabulary tokens ({ids[0]}, {ids[1]}); "
                             "the model emits them")
    openers = ", ".join(profile.open for profile in PROFILES)
    raise InputError(
        f"{where}: no thinking markers found for the LRM.\n"
        f"  looked for: {openers}\n"
        "  in: the end of the generation prompt, the chat template, and the vocabulary (opener and closer)\n"
        "Is this a reasoning model? If it is, set thinking.open and thinking.close in the recipe to the text that it "
        "writes around its thinking."
    )


def _tokenizer_file(path: Path) -> Path:
    """The file to name in a message: the first that is there."""
    found = (Path(path) / name for name in TOKENIZER_FILES if (Path(path) / name).is_file())
    return next(found, Path(path) / TOKENIZER_FILES[0])


def _check_spelling(tokenizer, text: str, key: str, where: Path) -> None:
    """InputError unless the tokenizer writes `text` without unknown tokens and reads it back unchanged."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    if unknown or not ids or back.strip() != text:  # SentencePiece may put a space in front
        found = "unknown tokens" if unknown else repr(back)
        raise InputError(f"{where}: the tokenizer cannot spell the marker {text!r} ({key}): it reads back as {found}; "
                         "set thinking.open and thinking.close to markers that this LRM's tokenizer knows")
