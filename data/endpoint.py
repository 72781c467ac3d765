"""An OpenAI-compatible server, asked with retries: the teacher and the judge."""

from functools import lru_cache

from vidreason import VidReasonError

STOPS = {  # what every call would meet: HTTP status -> advice
    401: "put a valid key into the environment variable that --api_key_env names",
    402: "top up the account",
    404: "check the model's name, and the address, which mostly ends in /v1",
}
FILTERED = ("content_filter", "content_policy_violation")  # error codes


class NoReply(Exception):
    """This call has no answer, others may have one. refused: the model, or a filter before it, declined."""

    def __init__(self, reason, refused: bool = False, usage: tuple[int, int] = (0, 0)):
        one_line = " ".join(str(reason).split())
        super().__init__(one_line[:300])
        self.refused = refused
        self.usage = usage


@lru_cache(maxsize=4)  # one pool of connections for all threads
def chat_client(**options):
    import openai

    return openai.OpenAI(**options)


def chat(
    url: str, model: str, messages: list[dict], key: str = "none", timeout: float = 120, tries: int = 8, **options
) -> tuple[str, tuple[int, int], str]:
    """One reply of an OpenAI-compatible endpoint -> (text, (prompt tokens, reply tokens), the model that served it).

    The client tries 408, 409, 429, 5xx, time-outs and broken connections again: after what Retry-After says (up to two
    minutes), else with exponential back-off and jitter. VidReasonError: every call would meet that; NoReply: this has.
    """
    import openai  # here, because it takes a second that no other program owes

    url = url.removesuffix("/chat/completions")
    try:
        client = chat_client(base_url=url, api_key=key, timeout=timeout, max_retries=tries - 1)
        completion = client.chat.completions.create(model=model, messages=messages, **options)
        return read_completion(completion)
    except openai.APIConnectionError as error:
        raise not_reached(error, url, f"{tries} tries of {timeout} s") from error
    except openai.APIStatusError as error:
        raise declined(error, url, model) from error
    except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise NoReply(f"the answer is no chat completion: {error}") from error


def read_completion(completion) -> tuple[str, tuple[int, int], str]:
    """-> what chat returns. NoReply: a refusal. AttributeError, IndexError, TypeError: it is no chat completion."""
    choice = completion.choices[0]
    text = choice.message.content or ""
    refusal = choice.message.refusal
    served_by = completion.model
    usage = (0, 0)
    if completion.usage:
        usage = (completion.usage.prompt_tokens or 0, completion.usage.completion_tokens or 0)
    if refusal or choice.finish_reason == "content_filter":
        raise NoReply(refusal or "stopped by a content filter", True, usage)
    return text, usage, served_by


def not_reached(error, url: str, patience: str) -> VidReasonError | NoReply:
    """What an APIConnectionError means: a wrong address, or a server that took too long or broke off."""
    cause = error.__cause__
    reason = f"{type(cause).__name__} {cause}"
    if reason.startswith(("Connect", "Proxy", "UnsupportedProtocol")):  # by name: the HTTP library has changed once
        return VidReasonError(f"cannot reach the endpoint: {reason} ({url}): check it, and its server")
    return NoReply(f"no answer in {patience}: {reason}")


def declined(error, url: str, model: str) -> VidReasonError | NoReply:
    """What an APIStatusError means: what every call would meet, or what is wrong with this one."""
    status = error.status_code
    if error.code == "insufficient_quota":  # which OpenAI calls 429, "too many requests"
        status = 402
    if status in STOPS:
        return VidReasonError(f"endpoint declines: {str(error)[:200]} ({url}, {model}): {STOPS[status]}")
    return NoReply(error, refused=error.code in FILTERED)
