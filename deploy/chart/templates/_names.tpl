{{- define "sealmount.selector" -}}
app.kubernetes.io/name: sealmount
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sealmount.labels" -}}
{{ include "sealmount.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* kubelet or api: the kubelet serves its pods by itself from 1.37 (KEP-4188). */}}
{{- define "sealmount.podsFrom" -}}
{{- if ne .Values.podsFrom "auto" }}{{ .Values.podsFrom }}
{{- else if semverCompare ">=1.37.0-0" .Capabilities.KubeVersion.Version }}kubelet
{{- else }}api
{{- end }}
{{- end }}

{{/* The audiences of all connections, each once, sorted, as a JSON list. */}}
{{- define "sealmount.audiences" -}}
{{- $all := list }}
{{- range .Values.config.connections }}{{ $all = append $all .auth.audience }}{{ end }}
{{- $all | uniq | sortAlpha | toJson }}
{{- end }}

{{/* The ports of all connections, each once, as a JSON list of strings. */}}
{{- define "sealmount.vaultPorts" -}}
{{- $all := list }}
{{- range .Values.config.connections }}
{{- range concat (list .address) (.redirect_to | default list) }}
{{- $url := urlParse . }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" }}
{{- $all = append $all ($port | default (ternary "443" "80" (eq $url.scheme "https"))) }}
{{- end }}
{{- end }}
{{- $all | uniq | sortAlpha | toJson }}
{{- end }}

{{- define "sealmount.image" -}}
{{- with .Values.image -}}
"{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}"
{{- end }}
{{- end }}

{{/* In CEL: whether the path of a directory d of the node leads to what stands in .plain of the variable, or the other way. */}}
{{- define "sealmount.leads" -}}
{{ . }}.plain == "/" || {{ . }}.plain == d || {{ . }}.plain.startsWith(d + "/") || d.startsWith({{ . }}.plain + "/")
{{- end }}
