"""Rules for role instructions and for messages to a help desk. `-` is the empty option, `_` a space at an end."""

from __future__ import annotations

RULES = {
    "role": """
        <opening>
        <body>
        <body>
        <request>
    """,
    "opening": """
        <asking> <acting> <part><part_tail>.
        <asking> <acting> <part><part_tail>.
        You are <part><part_tail>.
        As <part>, you {~will} {vp}<tail>.
        I {~need} <part><part_tail>.
        Imagine that you are <part><part_tail>.
    """,
    "asking": """
        I {~want} you to
        I {~want} you to
        I {~want} you to
        I {~want} you to
        Please
        You {~will}
        Today you {~will}
        {open} I {~want} you to
        {open} you {~will}
        From now on you {~will}
        Your {~work} is to
        Now
    """,
    "acting": """
        act as
        act as
        act as
        act like
        be
        become
        speak as
        play the part of
        take the role of
        think like
    """,
    "part": """
        a {who}
        a {mood} {who}
        a {mood} {who}
        a {how} {who}
        my {who}
        my {mood} {who}
        my {how} {who}
        the {who} {where}
        a {mood} and {how} {who}
        one of the {whos}
        the {mood} {who}
    """,
    "part_tail": """
        -
        -
        _who {vps}
        _{where}
        _and {vp}
        _and {vp} with me
        _for {whos} like me
        _for a {mood} {who}
        _with {aim}
        _who knows {aim}
        _so that I can {vp}
        , {~but} {~never} {vp}
        _that I never had
        _{when}
        _in a {mood} voice
    """,
    "body": """
        I {~will} <i_do>, and you {~will} <you_do>.
        I {~will} <i_do>, {~but} you {~will} <you_do>.
        {~when} I <i_do>, you {~will} <you_do>.
        You {~will} <you_do> {~when} I <i_do>.
        You {~will} <you_do><tail>.
        You {~will} <you_do>, and I {~will} <i_do>.
        You should <you_do><tail>.
        You {~will} {~never} <you_do><tail>.
        <imperative><tail>.
        <imperative><tail>.
        Then <imperative><tail>.
        {ly} <imperative><tail>.
        Your <yours> <duty><tail>.
        Your <yours> <duty>, {~but} {~never} {vp}.
    """,
    "i_do": """
        {~give} you {np}
        {~describe} {np}
        {~speak} to you about {np}
        ask for {aim}
        bring you {np}
        tell you of my {xs}
        tell you of my {x}
        {~often} lack {aim}
        show you {np}
        name a {x}
        {vp}
        lose {aim}
        {~need} {np}
    """,
    "you_do": """
        {vp}
        {vp}
        {~reply} with {aim}
        {~reply} as a {who} would
        {~help} me to {vp}
        {~help} me with my {x}
        {~describe} {np}
        {do} my {x}
        {do} my {xs} {ly}
        look for {aim}
        remind me of {np}
        ask about my {x}
        turn it into {aim}
        {~give} me {aim}
        {~give} me {num} {xs}
        see {aim} in a {x}
        {ly} {do} my {x}
    """,
    "imperative": """
        {~help} me to {vp}
        {~help} me with my {x}
        {~give} me {np}
        {~give} me {aim}
        {~give} me a {how} {x}
        {~give} me {num} {xs}
        {~describe} {np}
        {~describe} which {x} I should {do}
        {vp}
        {~never} {vp}
        {~only} {vp}
        {~keep} my {x} in view
        {~speak} to me about {np}
        tell me how to {vp}
        remind me of my {x}
        ask me about my {xs}
        suggest {num} {how} {xs}
        {~reply} with {aim}
        let us start with {np}
    """,
    "tail": """
        -
        -
        -
        _{when}
        _{where}
        _{ly}
        _with {aim}
        _{~before} I {vp}
        _{~when} I {vp}
        _{~when} {aim} is low
        _{~before} I lose {aim}
        _{~because} I {~need} {aim}
        _{~because} I lack {aim}
        , so that I can {vp}
        , so that my {aim} can grow
        _and {vp}
        _and {~give} me {aim}
        , {~but} {~never} {vp}
        , {~but} {~never} without {aim}
        _that I {~often} fear
    """,
    "yours": """
        {~work}
        {~work}
        {~answer}
        part
        first {~work}
        words
        role
    """,
    "duty": """
        is to {vp}
        is to {~help} me to {vp}
        is to {do} my {xs}
        should bring {aim}
        should hold a {how} {x}
        {~will} {~help} me to {vp}
        {~will} bring {aim} to a {who}
        {~will} {do} my {x}
        is {vping}
    """,
    "request": """
        <mine> is <wish>.
        <mine> is: <imperative><tail>.
        <mine> is about {np}<tail>.
        <start> I {~want} to {vp}<tail>.
        <start> I {~need} {np}<tail>.
        <start> <imperative><tail>.
        <start> how do I {do} my {x}<tail>?
        My {x} is {how}, so <imperative>.
        My {x} is {~very} {how}<tail>.
        I am a {who}, and I {~want} to {vp}<tail>.
    """,
    "mine": """
        My first request
        My first request
        My first {~question}
        My {~question}
        My first {x}
        What I {~need}
        What I {~want}
    """,
    "wish": """
        {np}
        a {how} {x} for {aim}
        a {x} that gives me {aim}
        how to {vp}
        how a {who} {does} {np}
        which {x} I should {do} first
        which {x} gives me {aim}
        {aim} for my {x}
    """,
    "start": """
        Today
        Now
        First of all,
        {open}
        So
        To begin with,
        This {~day}
    """,
    "support": """
        <hello><trouble><hope>.
        <hello><trouble>.
        <trouble><hope>.
        Can {~someone} {where} {vp} for me?
        Who {~will} {do} {np} that I sent back?
        Thank you for {vping} {ly}.
        With {mood} greetings from a {who}.
        Please {vp}<hope>.
    """,
    "hello": """
        Hello,
        Dear {who},
        {open}
        Good {~day},
        Once again:
        Excuse me,
    """,
    "trouble": """
        _I ordered {np}
        _I have waited {num} days for {np}
        _my {x} is {how}
        _the {x} that I {did} is {how}
        _I {did} the {x}, {~but} nothing happened
        _{np} is missing
        _I wrote to the {who} {num} times
        _it was the {how} {x} that I asked for
        _I bought {np} for a {who}
        _this is about {np}
        _your {who} was {mood}
    """,
    "hope": """
        _and I {~need} {~help}
        _and I {~hope} that a {who} can {vp}
        , so please {vp}
        , {~but} I {~need} {aim}
        _{~because} I {~need} {aim}
        _{~before} {~someone} {does} it
        _{where}
    """,
    # What a message of each category says.
    "billing": """
        I was charged twice for the {x}
        the invoice for the {x} shows the wrong amount
        my card was refused
        the price of the {x} changed after I paid
        I never got a receipt for {np}
        I am asked to pay for {np} again
    """,
    "delivery": """
        the parcel with the {x} never arrived
        the courier left the {x} {where}
        the {x} came a week late
        the tracking page has not moved
        the box was sent to the wrong street
        half of the {xs} were not in the box
    """,
    "account": """
        I cannot log in to my account
        I forgot my password
        my user name is gone
        I never got the code by mail
        someone changed my address in the profile
        I want to close my account with the {x}
    """,
    "returns": """
        I want to send the {x} back
        I would like to swap the {x} for a {how} one
        the {x} is the wrong size
        where do I get a return label for {np}
        I changed my mind about the {x}
        please refund the {x} I sent back
    """,
    "technical": """
        the {x} does not switch on
        the {x} shows an error
        the {x} makes a strange noise
        the app crashes at once
        the {x} stops after {num} minutes
        the update broke the {x}
    """,
    "thanks": """
        I want to thank your {who}
        the {x} is just what I hoped for
        your {who} was so helpful
        I will tell all {whos} about your {x}
        never had such {how} {xs}
        keep up your work with {xs}
    """,
}
