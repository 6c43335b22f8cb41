def test_x(author, hub):
    print(author.printed)
    for (kind, name), repo in hub.repos.items():
        for ref in repo.refs: print(kind, name, repo.private, ref, hub.titles(name, ref), list(hub.files(name, ref)))
    assert 0
