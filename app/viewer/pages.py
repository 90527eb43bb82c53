"""The few plain pages of the viewer origin: they say why, and show no patient data."""

from collections.abc import Iterator
from html import escape

from app.viewer import words
from app.viewer.explanation import Check, Explanation, State, Step

EHR_PAGE = (
    "Open the images from the EHR",
    (
        "This is the image viewer. It opens from an order or a patient in the electronic health "
        "record; by itself it shows nothing."
    ),
)
LABELS = {
    Check.ROLE: "Your role",
    Check.RELATIONSHIP: "Your tie to the patient",
    Check.RESTRICTION: "Whether the record is restricted",
    Check.ORDER: "The order",
    Check.IMAGES: "The images",
    Check.ARCHIVE: "The image archive",
    Check.ONE_PATIENT: "One patient",
    Check.SESSION: "Your viewer",
}
_STATES = {State.PASSED: "Passed", State.FAILED: "Failed", State.NOT_CHECKED: "Not checked"}
# Shapes as well as colours, for whoever does not tell red from green.
_MARKS = {
    State.PASSED: '<path d="M4.5 10.5l3.5 3.5 7.5-8"/>',
    State.FAILED: '<path d="M5.5 5.5l9 9m0-9l-9 9"/>',
    State.NOT_CHECKED: '<path d="M6 10h8"/>',
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: dark; }}
  * {{ box-sizing: border-box; }}
  body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem;
         background: #090c29; color: #e8ecf7; font: 17px/1.5 system-ui, sans-serif; }}
  main {{ width: 100%; max-width: 36rem; padding: 2.25rem 2.5rem; background: #14183a;
         border: 1px solid #2b3166; border-radius: 12px; }}
  h1 {{ margin: 0 0 .75rem; font-size: 1.4rem; line-height: 1.3; }}
  h2 {{ margin: 2rem 0 .5rem; font-size: .95rem; font-weight: 600; color: #aab4d8; }}
  p {{ margin: .75rem 0 0; }}
  .next {{ margin-top: 1.25rem; padding: .85rem 1.1rem; border-left: 3px solid #5acce6;
          border-radius: 0 8px 8px 0; background: #1b2150; }}
  .next + .next {{ margin-top: .6rem; border-color: #f2b84b; }}
  ul {{ margin: 0; padding: 0; list-style: none; }}
  li {{ display: grid; grid-template-columns: 1.6rem 1fr; padding: .45rem 0;
       border-top: 1px solid #23294f; font-size: .92rem; }}
  li:first-child {{ border-top: 0; }}
  li b {{ font-weight: 600; }}
  li span {{ display: block; color: #b9c2e2; }}
  svg {{ width: 1.15rem; height: 1.15rem; margin-top: .15rem; fill: none; stroke-width: 2.2;
        stroke-linecap: round; stroke-linejoin: round; }}
  .passed svg {{ stroke: #5fd08a; }}
  .failed svg {{ stroke: #ff8a80; }}
  .not-checked span {{ color: #8f9ac4; }}
  .not-checked svg {{ stroke: #8f9ac4; }}
  .id {{ margin-top: 1.75rem; color: #97a2cc; font-size: .8rem; overflow-wrap: anywhere; }}
  .hidden {{ position: absolute; width: 1px; height: 1px; overflow: hidden;
            clip-path: inset(50%); }}
  @media (max-width: 30rem) {{ main {{ padding: 1.5rem; }} body {{ padding: .75rem; }} }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{sentence}</p>
{next_steps}
{checks}
<p class="id">Reference for support: {request_id}</p>
</main>
</body>
</html>
"""


def page(
    title: str,
    sentence: str,
    request_id: str,
    next_step: str = words.OPEN_AGAIN,
    explanation: Explanation | None = None,
) -> str:
    """A whole HTML page; every text is escaped. With an explanation: its checks, and what it says
    to do next."""
    steps = [next_step] if explanation is None else list(_next_steps(explanation))
    return _PAGE.format(
        title=escape(title),
        sentence=escape(sentence),
        next_steps="\n".join(f'<p class="next">{escape(each)}</p>' for each in steps),
        checks="" if explanation is None else _checks(explanation),
        request_id=escape(request_id),
    )


def _next_steps(explanation: Explanation) -> Iterator[str]:
    yield explanation.next_step
    if explanation.breakable:
        yield f"{words.EMERGENCY} The EHR does that for you."


def _checks(explanation: Explanation) -> str:
    rows = "\n".join(_row(each) for each in explanation.chain)
    return f"<h2>What was checked</h2>\n<ul>\n{rows}\n</ul>"


def _row(step: Step) -> str:
    said, state = LABELS[step.check], step.state
    if state is State.PASSED:
        said = step.sentence
    text = f"<span>{escape(said)}</span>"
    if state is State.FAILED:
        text = f"<b>{escape(said)}</b><span>{escape(step.sentence)}</span>"
    return (
        f'<li class="{state.value}">'
        f'<svg viewBox="0 0 20 20" aria-hidden="true">{_MARKS[state]}</svg>'
        f'<div><i class="hidden">{_STATES[state]}: </i>{text}</div></li>'
    )
