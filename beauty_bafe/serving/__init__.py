"""The HTTP service: `app` has the endpoints, `page.html` and `docs.html` are its pages."""
