"""The tables of the frontier's SQLite file, and when a host may be asked next.

`host.ready_at` is when the host's first waiting page may be fetched; null while one of its pages is leased, at the cap of pages,
and where nothing waits. Keys are hashes of canonical URLs (`crawl.urls`); times are epoch seconds; `file`, `offset` and `length`
say where a page's record lies in the WARC files.
"""

SCHEMA = """
CREATE TABLE IF NOT EXISTS host (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, next_at REAL NOT NULL DEFAULT 0, ready_at REAL,
  pages INTEGER NOT NULL DEFAULT 0, faults INTEGER NOT NULL DEFAULT 0, trips INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS host_ready ON host(ready_at) WHERE ready_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS page (
  id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, url TEXT NOT NULL, host INTEGER NOT NULL,
  state TEXT NOT NULL DEFAULT 'queued', depth INTEGER NOT NULL, hops INTEGER NOT NULL DEFAULT 0, parent INTEGER,
  tries INTEGER NOT NULL DEFAULT 0, leases INTEGER NOT NULL DEFAULT 0, ready_at REAL NOT NULL DEFAULT 0,
  status INTEGER, reason TEXT, file INTEGER, offset INTEGER, length INTEGER, digest TEXT);
CREATE INDEX IF NOT EXISTS page_queued ON page(host, ready_at, id) WHERE state = 'queued';
CREATE INDEX IF NOT EXISTS page_leased ON page(host) WHERE state = 'leased';
CREATE TABLE IF NOT EXISTS robots (
  origin TEXT PRIMARY KEY, expires_at REAL NOT NULL, tries INTEGER NOT NULL, status INTEGER, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS refused (reason TEXT PRIMARY KEY, links INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS query (path BLOB PRIMARY KEY, pages INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
"""
REFRESH = """
UPDATE host SET ready_at = CASE
  WHEN pages >= :cap OR EXISTS (SELECT 1 FROM page WHERE page.host = host.id AND state = 'leased') THEN NULL
  ELSE (SELECT max(host.next_at, min(page.ready_at)) FROM page WHERE page.host = host.id AND state = 'queued') END
"""
