"""The response models of the endpoints, as OpenAPI shows them."""

from __future__ import annotations

from pydantic import BaseModel, Field

MASK = (
    "PNG in base64, white on the product; stretch it over the picture. Null if it was not requested or the network makes none"
)


class Answer(BaseModel):
    """One product that was found."""

    id: str
    score: float = Field(description="Higher is better; comparable within one answer")
    probability: float | None = Field(description="Probability that it is the product, 0 to 1; null without calibration")
    picture: str | None = Field(description="URL of a thumbnail; null if the catalogue has no file of it")


class SearchAnswer(BaseModel):
    """The products that look most like the picture, best first."""

    answers: list[Answer]
    known: bool | None = Field(
        description="Whether the best answer's probability, or score if that is null, reaches the threshold; null without one"
    )
    threshold: float | None
    mask: str | None = Field(description=MASK)
    version: str = Field(description="The version of the catalogue that was searched")
    milliseconds: float


class Description(BaseModel):
    """The descriptor of a picture."""

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
    403: "the request comes from a page of another site, or not through localhost",
    404: "no such product",
    409: "the id exists, or it is the last product",
    413: "too many bytes or pixels",
    415: "a file type that is not allowed",
    422: "a broken picture, or a bad setting",
    429: "too many requests are in progress; see Retry-After",
    503: "still loading",
    504: "the request took too long",
}


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The `responses` of an endpoint that may refuse requests with these statuses."""
    return {status: {"model": Problem, "description": PROBLEMS[status]} for status in statuses}


# A picture as the file `image` of a form, or as the body itself.
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
