"""A language model as judge: any server that speaks OpenAI's chat completions rates answers as AxBench does.

Three separate questions an answer (is the concept in it, does it keep to its instruction, is it fluent), each 0 to 2 on
the last "Rating:" of the reply; what cannot be read counts 0 (Wu et al. 2025, evaluators/lm_judge.py). Nothing is sent
anywhere unless a user gives the address. Cost: three requests an answer, some at a time.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sae.errors import UserError
from sae.steering.scores import overall

_ASK = {
    "concept": "Does the text hold the concept below? 0: no; 1: it does a little, or only in passing; 2: clearly.\n"
    "Concept: {concept}\nText: {answer}",
    "instruct": "Is the text related to the instruction below? Judge the relation alone, not quality or truth. "
    "0: unrelated; 1: somewhat; 2: clearly related.\nInstruction: {question}\nText: {answer}",
    "fluency": "How fluent is the text below? Judge the language alone; it may be cut off at its end. 0: not fluent, "
    "or it repeats itself; 1: somewhat; 2: fluent.\nText: {answer}",
}
_END = '\nThink in one sentence, then end with "Rating: [[0]]", "Rating: [[1]]" or "Rating: [[2]]".'
_RATING = re.compile(r"Rating:\s*\[*\s*([012])(?![\d.])")
_AT_ONCE = 8
_SECONDS = 120.0


@dataclass(frozen=True)
class Server:
    """Where the judge answers: the address up to /v1, the model's name there, and a key (sent as a bearer token)."""

    url: str
    model: str
    key: str = ""

    @classmethod
    def of(cls, url: str, model: str) -> Server:
        """With the key in OPENAI_API_KEY, where it is set."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"judge: {url} is no address. Give one such as http://localhost:8000/v1.")
        return cls(url.rstrip("/"), model, os.environ.get("OPENAI_API_KEY", ""))

    def says(self, text: str) -> str:
        """The reply to one message, at temperature 0. Raises UserError where there is none."""
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            raise UserError(f"judge: {self.url} answers {error.code} {error.reason}. Check key and model.") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"judge: {self.url} does not answer ({error}). Check the address.") from error
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"judge: {self.url} does not speak OpenAI's chat completions. Check the address."
            ) from error


def rating(reply: str) -> int:
    """The last rating in a reply; 0 where there is none."""
    found = _RATING.findall(reply)
    return int(found[-1]) if found else 0


def rated(server: Server, concept: str, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over answers {"question", "answer"}: concept, instruct, fluency, overall; each answer's own in "each"."""

    def one(answer: dict[str, Any]) -> dict[str, Any]:
        words = {"concept": concept, "question": answer["question"], "answer": answer["answer"]}
        found = {name: rating(server.says(ask.format(**words) + _END)) for name, ask in _ASK.items()}
        return found | {"overall": overall(found["concept"], found["instruct"], found["fluency"])}

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        each = list(pool.map(one, answers))
    keys = ("concept", "instruct", "fluency", "overall")
    return {key: sum(row[key] for row in each) / max(1, len(each)) for key in keys} | {"each": each}
