"""The HTTP interface: routes, keys, request ids, errors."""

from __future__ import annotations

import hmac
import mimetypes
import re
import time
import uuid
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yalis import __version__
from yalis.errors import EngineDeadError, RequestError
from yalis.server.answers import ClientGone
from yalis.server.body import check_json_type, check_origin, decode, read_body
from yalis.server.chat import serve_chat
from yalis.server.completions import serve_completion
from yalis.server.errors import ApiError, bad_request, engine_died, from_status, json_response, unavailable
from yalis.server.frontend import Frontend
from yalis.server.openapi import openapi
from yalis.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from yalis.server.requests import beside, check_ids, encode, render_chat
from yalis.server.state import server_state
from yalis.utils.logging import get_logger

logger = get_logger(__name__)
T = TypeVar("T", bound=msgspec.Struct)

# Open without a key: what probes and scrapers ask for, and the page, which holds nothing. The rest needs the key.
OPEN_PATHS = ("/", "/health", "/ready", "/metrics", "/version", "/openapi.json")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PAGE_FILE = re.compile(r"[A-Za-z0-9_-]+\.(html|js|css|svg|png|ico)")


def create_app(frontend: Frontend) -> Starlette:
    """The ASGI application over ``frontend``."""
    handlers = _Handlers(frontend)
    get, post = ["GET"], ["POST"]
    routes = [
        Route("/v1/completions", handlers.completions, methods=post),
        Route("/v1/chat/completions", handlers.chat, methods=post),
        Route("/v1/models", handlers.models, methods=get),
        Route("/v1/models/{name:path}", handlers.model, methods=get),
        Route("/tokenize", handlers.tokenize, methods=post),
        Route("/detokenize", handlers.detokenize, methods=post),
        Route("/tokenizer_info", handlers.tokenizer_info, methods=get),
        Route("/health", handlers.health, methods=get),
        Route("/ready", handlers.ready, methods=get),
        Route("/metrics", handlers.metrics, methods=get),
        Route("/version", handlers.version, methods=get),
        Route("/state", handlers.state, methods=get),
        Route("/start_profile", handlers.start_profile, methods=post),
        Route("/stop_profile", handlers.stop_profile, methods=post),
        Route("/openapi.json", handlers.openapi, methods=get),
        Route("/", handlers.page, methods=get),
        Route("/page/{name}", handlers.page, methods=get),
    ]
    middleware = []
    if frontend.options.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(frontend.options.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-request-id"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    middleware += [Middleware(_Bookkeeping, frontend=frontend), Middleware(_Keys, frontend=frontend)]
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error},  # type: ignore[dict-item]
    )
    app.router.redirect_slashes = False  # a redirect loses the body with many clients; 404 says what is wrong
    return app


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    response = from_status(error.status_code).response()
    response.headers.update(error.headers or {})
    return response


class _Bookkeeping:
    """Around every request: its id comes back, its end is counted, and faults of ours keep OpenAI's shape."""

    def __init__(self, app: ASGIApp, frontend: Frontend):
        self._app = app
        self._frontend = frontend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["yalis.request_id"] = request_id
        status = 0
        began = time.monotonic()

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except ClientGone:
            status = 499  # nobody reads it; the number is nginx's
        except Exception:
            logger.exception("request %s failed inside the server", request_id)
            if status == 0:
                error = ApiError(500, "the server failed on this request; its log says why", code="internal_error")
                await error.response()(scope, receive, send_on)
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            self._frontend.metrics.http(path, scope["method"], status)
            logger.info(
                "%s %s -> %d in %.3f s (request %s)",
                scope["method"],
                path,
                status,
                time.monotonic() - began,
                request_id,
            )


class _Keys:
    """Lets in who has a key, where there is one."""

    def __init__(self, app: ASGIApp, frontend: Frontend):
        self._app = app
        self._keys = [key.encode() for key in frontend.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not _is_open(scope["path"]):
            kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            key = given.strip().encode(errors="replace")
            # Every key is compared, each in constant time: the time taken tells nothing.
            matches = [hmac.compare_digest(key, known) for known in self._keys]
            if kind.lower() != "bearer" or not any(matches):
                error = ApiError(
                    401,
                    "a valid API key is needed: send the header 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
                response = error.response()
                response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/page/")


class _Handlers:
    """One method per endpoint."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        self._decoders: dict[type[msgspec.Struct], tuple[msgspec.json.Decoder[Any], frozenset[str]]] = {
            kind: (msgspec.json.Decoder(kind), frozenset(f.encode_name for f in msgspec.structs.fields(kind)))
            for kind in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
        }

    async def _body(self, request: Request, kind: type[T]) -> T:
        check_json_type(request)
        options = self._frontend.options
        body = await read_body(request, limit=options.max_body_bytes, timeout_s=options.body_timeout_s)
        if options.log_requests:
            logger.warning("request %s: %s", request.scope["yalis.request_id"], body.decode(errors="replace"))
        request.state.body_bytes = len(body)
        decoder, known = self._decoders[kind]
        value: T = decode(body, decoder, known)
        return value

    # ---- generation -------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await serve_completion(self._frontend, request, await self._body(request, CompletionRequest))

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await serve_chat(self._frontend, request, await self._body(request, ChatRequest))

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        names = self._frontend.model_names
        return json_response({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        return json_response(self._card(self._frontend.check_model(request.path_params["name"])))

    def _card(self, name: str) -> dict[str, Any]:
        client = self._frontend.client
        length = client.info.get("max_model_len") if client is not None else None
        return {
            "id": name,
            "object": "model",
            "created": self._frontend.created,
            "owned_by": "yalis",
            "root": self._frontend.config.model,
            "parent": None,
            "max_model_len": length,
        }

    # ---- tokens -----------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        body = await self._body(request, TokenizeRequest)
        return json_response(await beside(request, self._tokenized, body))

    def _tokenized(self, body: TokenizeRequest) -> dict[str, Any]:
        frontend = self._frontend
        frontend.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("send either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = render_chat(
                frontend,
                body.messages,
                tools=body.tools,
                variables=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
        else:
            assert body.prompt is not None
            tokens = encode(frontend, body.prompt, add_special_tokens=body.add_special_tokens is not False)
        tokenizer = frontend.need_tokenizer()
        strings = None
        if body.return_token_strs:
            strings = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
        return {
            "count": len(tokens),
            "max_model_len": frontend.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        body = await self._body(request, DetokenizeRequest)
        return json_response({"prompt": await beside(request, self._detokenized, body)})

    def _detokenized(self, body: DetokenizeRequest) -> str:
        frontend = self._frontend
        frontend.check_model(body.model)
        count, limit = len(body.tokens), frontend.max_model_len
        if count > limit:
            raise bad_request(
                f"tokens has {count} ids, at most {limit} (the model's context) are turned into text at once; send "
                "them in parts",
                "tokens",
            )
        check_ids(frontend, body.tokens, "tokens")
        skip = bool(body.skip_special_tokens)
        return frontend.need_tokenizer().decode(body.tokens, skip_special_tokens=skip)

    async def tokenizer_info(self, request: Request) -> Response:
        """``GET /tokenizer_info``."""
        tokenizer = self._frontend.need_tokenizer()
        return json_response(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": tokenizer.vocab_size,
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "chat_template": self._frontend.options.chat_template or tokenizer.chat_templates.get("default"),
            }
        )

    # ---- state ------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 while every rank is alive, loaded and heard."""
        if not self._frontend.healthy:
            raise unavailable(self._frontend.trouble, "unhealthy")
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: 200 while a request would get a token."""
        self._frontend.engine()
        return json_response({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self._frontend.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        return json_response({"version": __version__})

    async def state(self, request: Request) -> Response:
        """``GET /state``."""
        return json_response(server_state(self._frontend))

    async def openapi(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        return json_response(openapi(needs_key=bool(self._frontend.options.api_keys)))

    async def page(self, request: Request) -> Response:
        """``GET /`` and ``GET /page/NAME``."""
        name = request.path_params.get("name", "index.html")
        file = resources.files("yalis.server").joinpath("page", name)
        if not _PAGE_FILE.fullmatch(name) or not file.is_file():
            raise from_status(404)
        kind = mimetypes.guess_type(PurePosixPath(name))[0] or "application/octet-stream"
        return Response(file.read_bytes(), media_type=kind, headers=_PAGE_HEADERS)

    # ---- profiles ---------------------------------------------------------------------------------------------

    async def start_profile(self, request: Request) -> Response:
        """``POST /start_profile``."""
        await self._profile(request, start=True)
        return json_response({"status": "started"})

    async def stop_profile(self, request: Request) -> Response:
        """``POST /stop_profile``."""
        return json_response({"status": "stopped", "trace": await self._profile(request, start=False)})

    async def _profile(self, request: Request, *, start: bool) -> str:
        check_origin(request, self._frontend.options.allowed_origins)
        folder = self._frontend.options.profile_dir
        if folder is None:
            raise bad_request("the server was started without --profile-dir", code="profiling_disabled")
        try:
            return await self._frontend.engine().profile(start=start, folder=folder)
        except RequestError as error:
            raise ApiError(409, str(error), code="profiler_state") from None
        except EngineDeadError as error:
            raise engine_died(error) from None


# The page needs nothing from anywhere else, so it is allowed nothing else.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
