"""The HTTP service: `app` has the endpoints, `page.html` the page; the other modules are their parts."""
