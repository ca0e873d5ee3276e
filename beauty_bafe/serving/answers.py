"""What the endpoints answer, as OpenAPI shows it."""

from __future__ import annotations

from pydantic import BaseModel, Field

MASK = (
    "PNG, base64, white where the product is; stretch it over the picture. Null where not asked for, or the network makes none"
)


class Answer(BaseModel):
    """One product that was found."""

    id: str
    score: float = Field(description="Higher is better; comparable within one answer")
    probability: float | None = Field(description="That it is the product, 0 to 1; null where nothing calibrates it")
    picture: str | None = Field(description="Address of a thumbnail; null where the catalogue has no file of it")


class SearchAnswer(BaseModel):
    """The products that look most alike, best first."""

    answers: list[Answer]
    known: bool | None = Field(
        description="Whether the best answer reaches the threshold (of its probability, or of its score where that is null); "
        "null where nothing tells"
    )
    threshold: float | None
    mask: str | None = Field(description=MASK)
    version: str = Field(description="The version of the catalogue that was searched")
    milliseconds: float


class Description(BaseModel):
    """A picture as the index holds it."""

    descriptor: list[float]
    mask: str | None = Field(description=MASK)
    version: str
    milliseconds: float


class Change(BaseModel):
    """The catalogue after a change."""

    version: str
    pictures: int


class Health(BaseModel):
    """`status`: ok, or loading."""

    status: str


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


PROBLEMS = {
    401: "the token is missing or wrong",
    403: "another site's page asked, or not through localhost",
    404: "no such product",
    409: "the id is taken, or it is the last product",
    413: "too many bytes or pixels",
    415: "a kind of file that is not allowed",
    422: "a broken picture, or a bad setting",
    429: "too many requests are waiting; see Retry-After",
    503: "still loading",
    504: "it took too long",
}


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The `responses` of an endpoint that may refuse with these statuses."""
    return {status: {"model": Problem, "description": PROBLEMS[status]} for status in statuses}


# A picture as a form's file `image`, or as the body itself.
UPLOAD: dict[str, object] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
