"""`tessel chat`: a dialogue with a model, in a terminal or through a pipe.

Answers go to stdout, everything else to stderr. What the model has seen of the dialogue stays in its cache, so that a
turn computes what is new alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessel.config.chat import ChatConfig
from tessel.data.instruct.dialogue import ASSISTANT, USER, Dialogue, Message
from tessel.errors import TesselError
from tessel.generate.batcher import Batcher
from tessel.generate.dialogues import THOUGHT_TAGS, ChatTemplate
from tessel.generate.load import Opened, open_for_use
from tessel.generate.lockstep import in_step, waiting
from tessel.generate.prompts import sampling_of, stop_ids_of
from tessel.generate.request import Event, Request
from tessel.generate.terminal import Terminal, history_file, stoppable
from tessel.generate.text import TaggedText
from tessel.runtime.files import atomic_write, disk_errors, require_path

HELP = """\
/system [TEXT]   show the system text, or set it; /system none takes it away
/clear           forget the dialogue, and begin anew
/save FILE       write the dialogue as JSON, which /load and tessel sft read
/load FILE       go on with a dialogue that was saved
/thoughts        show the thoughts behind the last answer
/help            this
/exit            leave; so does Ctrl-D
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer, and what there is of it stays."""


def chat(cfg: ChatConfig, given: frozenset[str] = frozenset()) -> None:
    """Talk with the model until the input ends or the user leaves; `given` names the fields that the user set.

    Raises:
        TesselError: no model, no template; or, where nobody types, a message that cannot be answered.
    """
    with open_for_use(cfg.loading, cfg.tokenizer, cfg.launch, shape=cfg.model, given=given, together=False) as opened:
        template = ChatTemplate.of(opened.tokenizer, cfg.templating)
        with in_step(opened, max_running=1, kept_tokens=opened.config.max_position_embeddings) as batcher:
            if batcher is None:
                return
            terminal = Terminal(history_file(cfg.history_file))
            for line in (*opened.notes, f"template: {template.source}"):
                terminal.say(line)
            try:
                Chat(cfg, opened, template, terminal, batcher).run()
            finally:
                terminal.close()


@dataclass
class Chat:
    """A dialogue that goes on: `messages` alternate between the user and the model."""

    cfg: ChatConfig
    opened: Opened
    template: ChatTemplate
    terminal: Terminal
    batcher: Batcher
    messages: list[Message] = field(default_factory=list)
    system: str = ""
    thought: str = ""
    num_turns: int = 0
    """Answers given so far, forgotten ones included: each draws by a seed of its own."""

    def __post_init__(self) -> None:
        opened, drawing = self.opened, self.cfg.drawing
        self.system = self.cfg.system or ""
        self.stop_ids = stop_ids_of(drawing, opened.stop_ids | self.template.stop_ids(), opened.tokenizer)
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/clear": self._clear,
            "/new": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/thoughts": lambda _: self.terminal.say(self.thought or "the last answer had no thoughts"),
            "/help": lambda _: self.terminal.say(HELP),
        }

    def run(self) -> None:
        """Read, answer, and again."""
        if self.terminal.is_interactive:
            self.terminal.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                with waiting(self.batcher):
                    said = self.terminal.read()
            except KeyboardInterrupt:
                if not self.terminal.is_interactive:
                    raise
                self.terminal.say("\nCtrl-D or /exit leaves")
                continue
            if said is None or said.strip() in ("/exit", "/quit"):
                return
            try:
                self._take(said)
            except TesselError as error:
                if not self.terminal.is_interactive:
                    raise
                self.terminal.say(f"error: {error}")

    def _take(self, said: str) -> None:
        command, _, rest = said.partition(" ")
        if command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/") and "/" not in command[1:]:
            raise TesselError(
                f"{command} is no command; /help lists them. A message may begin with a space and then /."
            )
        elif said.strip():
            self.answer(said)

    # ------------------------------------------------------------------------------------- a turn

    def answer(self, said: str) -> None:
        """Ask, print what the model says, and remember both. A question that cannot be asked is forgotten."""
        self.messages.append(Message(USER, said))
        try:
            prompt_ids = self._prompt()
            text = self._stream(prompt_ids)
        except TesselError:
            self.messages.pop()
            raise
        self.messages.append(Message(ASSISTANT, text))

    def _prompt(self) -> tuple[int, ...]:
        """The ids of the dialogue; of a long one, of the last turns that leave room for an answer."""
        context = self.opened.config.max_position_embeddings
        room = context - min(self.cfg.drawing.max_new_tokens, context // 4)
        most = self.cfg.history_turns
        first = 0 if most is None else max(len(self.messages) - 1 - 2 * most, 0)
        while True:
            ids = self.template.prompt(Dialogue(tuple(self.messages[first:]), self.system))
            if len(ids) <= room or first + 1 >= len(self.messages):
                break
            first += 2
        if len(ids) > context:
            raise TesselError(f"the message has {len(ids)} tokens, more than the model's context of {context}.")
        if most is None and first:
            self.terminal.say(f"the context of {context} tokens is full: the first {first // 2} turns are left out")
        return ids

    def _stream(self, prompt_ids: tuple[int, ...]) -> str:
        """The answer without its thoughts, printed as it grows."""
        drawing = self.cfg.drawing
        request = Request(
            prompt_ids,
            sampling_of(drawing),
            drawing.max_new_tokens,
            self.stop_ids,
            drawing.stop,
            drawing.seed + self.num_turns,
        )
        self.num_turns += 1
        shown = _Answer(self.terminal, self.template.begins_in_thought(prompt_ids), self.cfg.show_thoughts)
        with stoppable() as is_stopped:
            number = self.batcher.add(request)
            finish = None
            while finish is None:
                if is_stopped():
                    self.batcher.cancel(number)
                for event in self.batcher.step():
                    shown.push(event)
                    finish = event.finish
        answer = shown.finish()
        self.thought = shown.thought
        if finish == "cancelled":
            self.terminal.say("stopped")
        elif finish == "length":
            self.terminal.say(f"cut off after {shown.num_tokens} tokens (--max-new-tokens, or the context is full)")
        return answer

    # ------------------------------------------------------------------------------------- commands

    def _set_system(self, text: str) -> None:
        if text:
            self.system = "" if text == "none" else text
        self.terminal.say(f"system: {self.system}" if self.system else "no system text but the template's own")

    def _clear(self, _: str) -> None:
        self.messages.clear()
        self.thought = ""
        self.terminal.say("the dialogue is forgotten")

    def _save(self, name: str) -> None:
        if not name:
            raise TesselError("/save needs the name of a file.")
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *({"role": one.role, "content": one.content} for one in self.messages)]
        path = Path(name).expanduser()
        with disk_errors(path), atomic_write(path) as temporary:
            temporary.write_text(json.dumps([{"messages": messages}], ensure_ascii=False, indent=1) + "\n")
        self.terminal.say(f"{len(self.messages)} messages in {path}")

    def _load(self, name: str) -> None:
        if not name:
            raise TesselError("/load needs the name of a file.")
        self.system, self.messages = read_dialogue(require_path(Path(name).expanduser(), "/load"))
        self.terminal.say(f"{len(self.messages)} messages from {name}")


class _Answer:
    """What the model says, as it is shown: its thoughts folded into one remark, unless they are asked for."""

    def __init__(self, terminal: Terminal, is_thinking: bool, shows_thoughts: bool) -> None:
        self._terminal, self._shows_thoughts = terminal, shows_thoughts
        self._tagged = TaggedText(*THOUGHT_TAGS, is_inside=is_thinking)
        self._thoughts: list[str] = []
        self._pieces: list[str] = []
        self.num_tokens = 0

    @property
    def thought(self) -> str:
        """All that was thought."""
        return "".join(self._thoughts).strip()

    def push(self, event: Event) -> None:
        self.num_tokens += event.token is not None
        self._show(self._tagged.push(event.text))
        if self._tagged.is_inside and not self._shows_thoughts:
            self._terminal.wait(f"thinking: {self.num_tokens} tokens")

    def finish(self) -> str:
        """The answer."""
        self._show(self._tagged.finish())
        self._fold()
        self._terminal.write("\n")
        return "".join(self._pieces)

    def _show(self, pieces: list[tuple[bool, str]]) -> None:
        for is_thought, piece in pieces:
            if is_thought:
                self._thoughts.append(piece)
            else:
                if not self._pieces:
                    piece = piece.lstrip("\n") if self._thoughts else piece
                    if not piece:
                        continue
                    self._fold()
                self._pieces.append(piece)
            if not is_thought or self._shows_thoughts:
                self._terminal.write(piece)

    def _fold(self) -> None:
        """Once, before the answer begins: that there were thoughts."""
        if self.thought and not self._pieces:
            self._terminal.wait("")
            if self._shows_thoughts:
                self._terminal.write("\n")
            else:
                self._terminal.say(f"[thought: {len(self.thought.split())} words; /thoughts shows them]")


def read_dialogue(path: Path) -> tuple[str, list[Message]]:
    """The system text and the messages of a file of `/save`: one dialogue, alone or in a list.

    Raises:
        TesselError: it holds no such dialogue.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        row = found[0] if isinstance(found, list) and len(found) == 1 else found
        messages = [Message(one["role"], one["content"]) for one in row["messages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TesselError(f"{path} holds no dialogue as /save writes it ({type(error).__name__}: {error}).") from error
    system = messages.pop(0).content if messages and messages[0].role == "system" else ""
    roles = [one.role for one in messages]
    whole = all(isinstance(one.content, str) for one in (*messages, Message("system", system)))
    if not whole or roles != [USER, ASSISTANT] * (len(roles) // 2):
        raise TesselError(f"{path}: user and assistant must take turns, the user first; the roles are {roles}.")
    return system, messages
