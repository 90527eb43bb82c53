"""The few plain pages of the viewer origin: they say why, and show no patient data."""

from html import escape

EHR_PAGE = (
    "Open the images from the EHR",
    (
        "This is the image viewer. It opens from an order or a patient in the electronic health "
        "record; by itself it shows nothing."
    ),
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: dark; }}
  body {{ margin: 0; min-height: 100vh; display: grid; place-items: center;
         background: #090c29; color: #e8ecf7; font: 17px/1.5 system-ui, sans-serif; }}
  main {{ max-width: 32rem; margin: 2rem; padding: 2.5rem; background: #14183a;
         border: 1px solid #2b3166; border-radius: 12px; }}
  h1 {{ margin: 0 0 .75rem; font-size: 1.4rem; line-height: 1.3; }}
  p {{ margin: .75rem 0 0; }}
  .next {{ color: #aab4d8; }}
  .id {{ margin-top: 1.75rem; color: #8390bd; font-size: .8rem; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{sentence}</p>
<p class="next">{next_step}</p>
<p class="id">Reference for support: {request_id}</p>
</main>
</body>
</html>
"""


def page(
    title: str,
    sentence: str,
    request_id: str,
    next_step: str = "Close this tab, go back to the EHR and open the images from there.",
) -> str:
    """A whole HTML page; every text is escaped."""
    return _PAGE.format(
        title=escape(title),
        sentence=escape(sentence),
        next_step=escape(next_step),
        request_id=escape(request_id),
    )
