"""An OpenAI-compatible server, asked with retries: the teacher and the judge."""

from functools import lru_cache

from vidreason import VidReasonError

STOPS = {  # what every call would meet: HTTP status → advice
    401: "put a valid key into the environment variable that --api_key_env names",
    402: "top up the account",
    404: "check the model's name, and the address, which mostly ends in /v1",
}


class NoReply(Exception):
    """This call has no answer, others may have one. refused: the model, or a filter before it, declined."""

    def __init__(self, reason, refused=False, usage=(0, 0)):
        super().__init__(" ".join(str(reason).split())[:300])
        self.refused, self.usage = refused, usage


@lru_cache(maxsize=4)  # one pool of connections for all threads
def chat_client(**options):
    import openai

    return openai.OpenAI(**options)


def chat(url, model, messages, key="none", timeout=120, tries=8, **options):
    """One reply of an OpenAI-compatible endpoint → (text, (prompt tokens, reply tokens), the model that served it).

    The client tries 408, 409, 429, 5xx, time-outs and broken connections again: after what Retry-After says (up to two
    minutes), else with exponential back-off and jitter. VidReasonError: every call would meet that; NoReply: this has.
    """
    import openai  # here, because it takes a second that no other program owes

    try:
        url = url.removesuffix("/chat/completions")
        client = chat_client(base_url=url, api_key=key, timeout=timeout, max_retries=tries - 1)
        reply = client.chat.completions.create(model=model, messages=messages, **options)
        choice, used = reply.choices[0], reply.usage
        usage = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        text, refusal, served_by = choice.message.content or "", choice.message.refusal, reply.model
    except openai.APIConnectionError as error:
        why = f"{type(error.__cause__).__name__} {error.__cause__}"  # names: the client's HTTP library has changed once
        if why.startswith(("Connect", "Proxy", "UnsupportedProtocol")):
            raise VidReasonError(f"cannot reach the endpoint: {why} ({url}): check it, and its server") from error
        raise NoReply(f"no answer in {tries} tries of {timeout} s: {why}") from error
    except openai.APIStatusError as error:
        status = 402 if error.code == "insufficient_quota" else error.status_code  # which OpenAI calls 429
        if status in STOPS:
            raise VidReasonError(f"endpoint declines: {str(error)[:200]} ({url}, {model}): {STOPS[status]}") from error
        raise NoReply(error, error.code in ("content_filter", "content_policy_violation")) from error
    except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise NoReply(f"the answer is no chat completion: {error}") from error
    if refusal or choice.finish_reason == "content_filter":
        raise NoReply(refusal or "stopped by a content filter", True, usage)
    return text, usage, served_by
