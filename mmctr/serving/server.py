"""`mmctr serve`: an HTTP server with an API and a page, which searches, embeds, scores and explains.

The page and the description of the API are files of the package; nothing is loaded from another host. Requests are
checked and limited in size: a wrong request gets a status 4xx with a reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmctr.data.images import PictureError
from mmctr.errors import UnknownId
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.indexed_items import Neighbour
from mmctr.serving.guards import (
    BUDGET,
    BodyLimit,
    Connection,
    HeadAsGet,
    SameOrigin,
    TimeBudget,
    most_connections,
    quiet_loop,
)
from mmctr.serving.schemas import (
    Answer,
    EmbedRequest,
    ExplainRequest,
    Explanation,
    Found,
    K,
    Ranking,
    RankRequest,
    ScoreRequest,
    SearchRequest,
    Text,
    Vectors,
    WrittenId,
)
from mmctr.serving.scoring import Scorer
from mmctr.serving.search import Searcher
from mmctr.serving.service import Busy, Service

logger = logging.getLogger(__name__)

GRACE = 5
"""seconds that requests have to end after the server is told to"""
STATIC = Path(__file__).parent / "static"
"""folder of the page"""


def create_app(
    service: Service,
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]", "testserver"),
    budget: float = BUDGET,
) -> FastAPI:
    """The HTTP application of a service.

    Args:
        service: answers the requests.
        hosts: accepted host names of requests, so that a page of another site cannot reach the server by a name that
            resolves to this machine.
        budget: seconds for one request.
    """
    app = FastAPI(
        title="mmctr",
        description="Search items by words, pictures, items and users; score and explain with a ranker.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(TimeBudget, seconds=budget)
    app.add_middleware(SameOrigin)
    app.add_middleware(HeadAsGet)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.exception_handler(Busy)
    def busy(_: Request, error: Busy) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "5"})

    @app.exception_handler(ValueError)
    def refuse(_: Request, error: ValueError) -> JSONResponse:
        status = 404 if isinstance(error, UnknownId) else 400
        return JSONResponse({"detail": str(error)}, status)

    @app.get("/api/facts", tags=["about"], summary="What is served")
    def facts() -> dict[str, Any]:
        return known

    @app.post("/api/search", tags=["search"], summary="Nearest items to a query, or a mix")
    def search(request: SearchRequest) -> Answer:
        return _answer(service.search(request))

    @app.post("/api/search/picture", tags=["search"], summary="Nearest items to an uploaded picture")
    def search_picture(
        picture: Annotated[UploadFile, File()],
        k: Annotated[K, Form()] = 10,
        where: Annotated[list[Text] | None, Form()] = None,
    ) -> Answer:
        return _answer(service.search_picture(picture.file.read(), k, where or []))

    @app.post("/api/embed", tags=["search"], summary="Vectors of texts")
    def embed(request: EmbedRequest) -> Vectors:
        with service.computing():
            return Vectors(vectors=service.searcher.encoder.embed(texts=request.texts).tolist())

    @app.post("/api/score", tags=["rank"], summary="Click probabilities of given items for a user")
    def score(request: ScoreRequest) -> Ranking:
        return service.score(request)

    @app.post("/api/rank", tags=["rank"], summary="The best items for a user")
    def rank(request: RankRequest) -> Ranking:
        return service.rank(request)

    @app.post("/api/explain", tags=["rank"], summary="What each item of the history does to a score")
    def explain(request: ExplainRequest) -> Explanation:
        return service.explain(request)

    @app.get("/api/users", tags=["rank"], summary="Users whose id begins so")
    def users(
        starts: Annotated[str, Query(max_length=100)] = "", count: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> list[WrittenId]:
        return service.users(starts, count)

    @app.get("/api/picture", tags=["about"], summary="The picture of an item")
    def picture(item_id: Annotated[str, Query(max_length=500)]) -> Response:
        try:
            content = service.picture(item_id)
        except PictureError as error:
            raise HTTPException(404, error.reason) from None
        kind = next((kind for magic, kind in PICTURES.items() if content.startswith(magic)), None)
        if kind is None:
            raise HTTPException(404, "the picture is in a format browsers do not show")
        return Response(content, media_type=kind, headers={"Cache-Control": "max-age=3600", **NO_SNIFF})

    for path, name in (("/", "index.html"), ("/docs", "docs.html"), ("/page.js", "page.js"), ("/docs.js", "docs.js")):
        app.get(path, include_in_schema=False)(_page(STATIC / name))
    app.get("/style.css", include_in_schema=False)(_page(STATIC / "style.css"))
    known = service.facts()
    return app


PICTURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}
"""media type of a picture by the first bytes"""
NO_SNIFF = {"X-Content-Type-Options": "nosniff"}
POLICY = "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; connect-src 'self'"


def _answer(neighbours: list[Neighbour]) -> Answer:
    """The answer to a search."""
    return Answer(items=[Found(item_id=n.item_id, score=n.score, title=n.title) for n in neighbours])


def _page(path: Path) -> Callable[[], FileResponse]:
    """An endpoint that returns a file of the page."""

    def page() -> FileResponse:
        return FileResponse(path, headers={"Content-Security-Policy": POLICY, **NO_SNIFF})

    return page


def serve(
    index: str,
    ranker: str | None,
    baseline: str | None,
    data: str | None,
    run: str | None,
    embeddings: list[str],
    host: str,
    port: int,
) -> None:
    """Load index and rankers, then answer requests until the process is interrupted.

    Args:
        index: index folder, embedding folder or file of vectors.
        ranker: folder of the ranking run that scores; None: no scores.
        baseline: folder of another ranking run for comparison; None: none.
        data: dataset folder; None: the datasets of the vectors and of the rankers.
        run: pretraining run that encodes texts and pictures; None: the run that made the vectors.
        embeddings: folders with vectors of items that are new to the ranker.
        host: address to listen on.
        port: port to listen on.

    Raises:
        ValueError: an index, run or dataset cannot be read.
    """
    import faiss
    import torch
    import uvicorn

    # each request uses one core: threads inside requests would compete for the cores
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    searcher = Searcher(ItemIndex.load(index), run, data)
    scorers = {}
    for name, folder in (("ranker", ranker), ("baseline", baseline)):
        if folder:
            scorers[name] = Scorer(folder, data, embeddings if name == "ranker" else ())
    service = Service(searcher, scorers, data)
    if searcher.has_encoder:
        searcher.encoder  # noqa: B018  (loaded now rather than at the first query)
    hosts = ("*",) if host in ("0.0.0.0", "::") else (host, "localhost", "127.0.0.1", "[::1]")
    logger.info(f"http://{host}:{port}   (API: http://{host}:{port}/docs; Ctrl-C stops)")
    Connection.most = most_connections()
    config = uvicorn.Config(
        create_app(service, hosts),
        host=host,
        port=port,
        log_level="warning",
        loop="asyncio",
        http=Connection,
        backlog=128,
        timeout_graceful_shutdown=GRACE,
    )

    async def answer() -> None:
        quiet_loop(asyncio.get_running_loop())
        await uvicorn.Server(config).serve()

    with suppress(KeyboardInterrupt):
        asyncio.run(answer())
