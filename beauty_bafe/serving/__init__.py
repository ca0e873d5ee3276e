"""The HTTP service: `app` holds the endpoints, `page.html` the page; the other files are their parts."""
